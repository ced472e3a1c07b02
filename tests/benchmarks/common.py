"""What every quality benchmark shares: its cases, paired statistics, timing, the table.

A benchmark gives a Program and a function that scores a runnable; :func:`study` does the rest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.contract import Context, Pass
from thresher.compiler.errors import ThresherError
from thresher.compiler.program import Program
from thresher.passes.cleanup import Cleanup
from thresher.passes.tokens import methods
from thresher.passes.tokens.options import TokenOptions
from thresher.runtime import ProgramRunner, export, profile
from thresher.runtime.conditions import conditions, load_average
from thresher.runtime.measure import Plan
from thresher.runtime.runner import Runnable

Values = NDArray[Any]
BUDGETS = (0.8, 0.65, 0.5)
RESAMPLES = 1000
CONTROL = "random"
METHODS: dict[str, tuple[type[Pass[Any]], type[Any]]] = {
    CONTROL: (methods.RandomDrop, methods.RandomOptions),
    "tome": (methods.Tome, methods.TomeOptions),
    "evit": (methods.Evit, methods.EvitOptions),
    "topk-norm": (methods.TopkNorm, TokenOptions),
}


@dataclass(frozen=True)
class Metric:
    """One score of one model.

    ``items`` ``[n, ...]`` is what each test item contributes and ``statistic`` makes the score of
    any choice of them; ``decisions`` ``[n]``, where there are any, are compared for flips.
    """

    name: str
    items: Values
    statistic: Callable[[Values], float] = lambda items: float(items.mean())
    decisions: Values | None = None
    larger_is_better: bool = True

    @property
    def value(self) -> float:
        return self.statistic(self.items)


@dataclass(frozen=True)
class Difference:
    """Score minus a reference's on the same items, and the standard error of that difference."""

    value: float
    error: float
    flips: int | None

    @property
    def sigmas(self) -> float:
        """The difference in standard errors; 0 where nothing differs."""
        return self.value / self.error if self.error > 1e-12 else 0.0


def difference(metric: Metric, reference: Metric, seed: int = 0) -> Difference:
    """Paired difference; its error by the bootstrap over items (Efron, 1979)."""
    rng = np.random.default_rng(seed)
    count = len(metric.items)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, count, count)
        drawn.append(
            metric.statistic(metric.items[chosen]) - reference.statistic(reference.items[chosen])
        )
    flips = None
    if metric.decisions is not None and reference.decisions is not None:
        flips = int((metric.decisions != reference.decisions).sum())
    return Difference(metric.value - reference.value, float(np.std(drawn, ddof=1)), flips)


@dataclass
class Case:
    """One row: a method at a budget (dense: neither), and what was found."""

    method: str
    flops: float | None
    program: Program | None = None
    refused: str | None = None
    tokens: list[int] = field(default_factory=list)
    ideal: float | None = None
    metrics: list[Metric] = field(default_factory=list)
    speedup: dict[str, float] | None = None

    @property
    def name(self) -> str:
        return self.method if self.flops is None else f"{self.method} {self.flops:g}"


Evaluate = Callable[[Runnable], list[Metric]]


@dataclass
class Study:
    """A finished benchmark."""

    title: str
    notes: list[str]
    cases: list[Case]
    batch: int
    conditions: dict[str, Any]

    def case(self, method: str, flops: float | None) -> Case | None:
        return next((c for c in self.cases if (c.method, c.flops) == (method, flops)), None)


def parser(description: str | None, *, limit: int) -> argparse.ArgumentParser:
    """Options that all benchmarks have; ``limit`` is the full number of test items."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--limit", type=int, default=limit, help="test items (default: all)")
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    made.add_argument("--batch", type=int, default=None, help="batch size when timing")
    made.add_argument("--rounds", type=int, default=15, help="timed rounds; 0: no timing")
    made.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    made.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    made.add_argument("--eager", action="store_true", help="score with torch instead of engines")
    made.add_argument("--json", type=Path, default=None, help="also write the result here")
    return made


def reduced(program: Program, method: str, flops: float, **options: Any) -> Case:
    """A Program reduced by a method, or the reason why not."""
    case = Case(method, flops)
    make, make_options = METHODS[method]
    try:
        result = make(make_options(flops=flops, **options))(program, Context())
    except ThresherError as error:
        case.refused = str(error)
        return case
    if not result.applied:
        case.refused = result.refused[0].reason if result.refused else "nothing to reduce"
        return case
    case.program = Cleanup()(result.program, Context()).program
    case.tokens, case.ideal = list(result.details["tokens"]), float(result.details["ideal"])
    return case


def study(
    title: str,
    program: Program,
    evaluate: Evaluate | None,
    args: argparse.Namespace,
    *,
    batch: int,
    sizes: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    **options: Any,
) -> Study:
    """Reduce, export, score and time.

    Args:
        title: of the table.
        program: the dense model.
        evaluate: scores a runnable; None: time only.
        args: of :func:`parser`.
        batch: batch size when timing, unless the command line says otherwise.
        sizes: other symbolic sizes when timing.
        notes: lines below the table.
        options: further options of every method.
    """
    load = load_average()
    cases = [Case("dense", None, program)]
    for flops in args.budgets:
        cases += [reduced(program, method, flops, **options) for method in args.methods]
    batch = args.batch or batch
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thresher-")))
        engines: dict[str, Any] = {}
        for index, case in enumerate(cases):
            if case.program is None:
                continue
            say(f"{title}: {case.name} ({index + 1}/{len(cases)})")
            runnable: Runnable = ProgramRunner(case.program, name=case.name, threads=args.threads)
            if not args.eager:
                runnable = stack.enter_context(
                    export(case.program, place / f"{index}.engine", threads=args.threads)
                )
                engines[case.name] = runnable
            if evaluate is not None:
                case.metrics = evaluate(runnable)
        if engines and args.rounds:
            say(f"{title}: timing {len(engines)} engines")
            _time(cases, engines, batch, args, sizes)
        where = conditions(args.threads, load)
    found = Study(title, list(notes), cases, batch, dict(vars(where)))
    if where.busy:
        found.notes.append(where.busy)
    return found


def _time(
    cases: list[Case],
    engines: Mapping[str, Any],
    batch: int,
    args: argparse.Namespace,
    sizes: Mapping[str, int] | None,
) -> None:
    """Interleave all engines; note each case's speed-up over dense and its share of the ideal."""
    plan = Plan(rounds=args.rounds, seconds=600.0, warm_up=6)
    measured = profile(
        list(engines.values()),
        batches=[batch],
        threads=args.threads,
        plan=plan,
        sizes=sizes,
        memory=False,
    )
    timings = dict(zip(engines, measured.timings, strict=True))
    for case in cases:
        timing = timings.get(case.name)
        if timing is None:
            continue
        case.speedup = {"milliseconds": timing.latency.median * 1000}
        if timing.speedup is not None and case.ideal:
            ratio = timing.speedup
            case.speedup |= {
                "ratio": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "realised": ratio.median / case.ideal,
            }


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
