"""Reduced models against the dense one and a control: quality and time of all in one run.

Every model is scored on the same items, so that differences are paired, and all engines are timed
interleaved.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import ThresherError
from thresher.runtime.conditions import Conditions, conditions, default_threads, load_average
from thresher.runtime.deviation import plain
from thresher.runtime.engine import Engine
from thresher.runtime.exporting import export
from thresher.runtime.measure import Plan
from thresher.runtime.paired import Difference, Metric, difference
from thresher.runtime.profiling import Progress, profile
from thresher.runtime.runner import ProgramRunner, Runnable
from thresher.runtime.timing import Timing

if TYPE_CHECKING:
    from thresher.compiler.variants import Variant

SCHEMA = "thresher.compare/1"
SECONDS, WARM_UP = 600.0, 6  # of the timing: most time in all, most runs to warm up a model
Evaluate = Callable[[Runnable], list[Metric]]


@dataclass(frozen=True)
class Score:
    """A metric of a row with its standard error, and differences on the same items."""

    name: str
    value: float
    error: float
    items: int
    percent: bool
    larger_is_better: bool
    against_dense: Difference | None = None
    against_control: Difference | None = None


@dataclass(frozen=True)
class Row:
    """One model: ``share`` of the dense multiply-accumulates is spent, ``asked`` was asked for.

    ``ideal`` is the speed-up if time went with multiply-accumulates, ``realised`` the measured
    one's part of it.  A row that was ``refused`` has no more than the reason.
    """

    method: str
    asked: float | None
    control: bool
    refused: str | None = None
    share: float | None = None
    tokens: tuple[int, ...] = ()
    ideal: float | None = None
    scores: tuple[Score, ...] = ()
    time: Timing | None = None
    realised: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """``"tome 0.5"``."""
        return self.method if self.asked is None else f"{self.method} {self.asked:g}"


@dataclass(frozen=True)
class Comparison:
    """All rows; the first is the dense model."""

    rows: tuple[Row, ...]
    control: str
    batch: int
    target: str
    precision: str
    conditions: Conditions
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data under a versioned schema."""
        return {"schema": SCHEMA, **plain(asdict(self))}


@dataclass(frozen=True)
class Verdict:
    """Whether a row loses no more than ``max_drop`` points, and the best row in a sentence."""

    met: bool
    max_drop: float
    best: str
    sentence: str


def judged(found: Comparison, methods: Sequence[str], max_drop: float) -> Verdict:
    """Look for rows of these methods that keep their first score; of those the fastest is best."""
    rows = [row for row in found.rows[1:] if row.method in methods and row.scores]
    if not rows:
        return Verdict(False, max_drop, "", "no row is left to judge: every method was refused")
    kept = [row for row in rows if _drop(row) <= max_drop]
    best = max(kept, key=_speed) if kept else min(rows, key=_drop)
    change = best.scores[0].against_dense
    error = 100 * change.error if change else 0.0
    told = (
        f"{best.name} ({-_drop(best):+.2f} points, standard error {error:.2f},"
        f" {_speed(best):.2f} times as fast as dense)"
    )
    if kept:
        text = f"{len(kept)} of {len(rows)} rows lose at most {max_drop:g} points; fastest: {told}"
    else:
        text = f"no row loses at most {max_drop:g} points; the best row found is {told}"
    return Verdict(bool(kept), max_drop, best.name, text)


def _drop(row: Row) -> float:
    """Points (hundredths) by which the first score is below the dense model's."""
    change = row.scores[0].against_dense
    return -100 * change.value if change else 0.0


def _speed(row: Row) -> float:
    return row.time.speedup.median if row.time and row.time.speedup else 1.0


@dataclass
class _Entry:
    """A row in the making."""

    variant: Variant
    runnable: Engine | ProgramRunner | None = None
    metrics: Sequence[Metric] = ()
    time: Timing | None = None


def compare(
    variants: Sequence[Variant],
    evaluate: Evaluate | None,
    *,
    control: str,
    target: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    batch: int = 1,
    rounds: int = 15,
    sizes: Mapping[str, int] | None = None,
    eager: bool = False,
    seed: int = 0,
    load: float | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Export, score and time.

    Args:
        variants: the dense model and then the reduced ones.
        evaluate: scores a runnable, the dense model first, always with the same metrics on the same
            items; None: time only.
        control: the method whose rows are the control of others at the same budget.
        target: back end.
        precision: one of the target's.
        threads: CPU threads; by default the physical cores, at most 8.
        batch: samples in a batch when timing.
        rounds: timed visits of every model; 0: no timing.
        sizes: sizes of symbolic axes other than the batch when timing.
        eager: run the Programs with torch instead of exporting them.
        seed: of resampling and of the order of visits.
        load: the machine's load average before all work; by default the present one.
        progress: called with what is being done, steps done, and steps in all.

    Raises:
        ThresherError: the dense model cannot be exported or scored; of another one that is a row.
    """
    progress = progress or (lambda what, done, total: None)
    threads = default_threads() if threads is None else threads
    load = load_average() if load is None else load
    entries = [_Entry(variant) for variant in variants]
    exported = partial(export, target=target, precision=precision, threads=threads)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thresher-")))
        for number, entry in enumerate(entries):
            variant = entry.variant
            if variant.program is None:
                continue
            progress(f"exporting {variant.name}", number, len(entries))
            try:
                if eager:
                    entry.runnable = ProgramRunner(variant.program, threads=threads)
                else:
                    entry.runnable = stack.enter_context(
                        exported(variant.program, place / str(number))
                    )
            except ThresherError as error:
                if not number:
                    raise
                entry.variant = dataclasses.replace(variant, program=None, refused=str(error))
                continue
            entry.runnable.name = variant.name
            if evaluate is not None:
                entry.metrics = evaluate(entry.runnable)
        if rounds:
            plan = Plan(rounds=rounds, seconds=SECONDS, warm_up=WARM_UP, seed=seed)
            _time(entries, batch, threads, plan, sizes, progress)
        where = conditions(threads, load)
    progress("standard errors", 0, 0)
    rows = tuple(_row(entry, entries, control, seed) for entry in entries)
    notes = (where.busy,) if where.busy else ()
    what = "eager torch" if eager else target
    return Comparison(rows, control, batch, what, precision, where, notes)


def _time(
    entries: Sequence[_Entry],
    batch: int,
    threads: int,
    plan: Plan,
    sizes: Mapping[str, int] | None,
    progress: Progress,
) -> None:
    """All models interleaved."""
    timed = [entry for entry in entries if entry.runnable is not None]
    found = profile(
        [entry.runnable for entry in timed if entry.runnable is not None],
        batches=[batch],
        threads=threads,
        plan=plan,
        sizes=sizes,
        memory=False,
        progress=lambda what, done, total: progress(f"timing, {what}", done, total),
    )
    for entry, timing in zip(timed, found.timings, strict=True):
        entry.time = timing


def _row(entry: _Entry, entries: Sequence[_Entry], control: str, seed: int) -> Row:
    variant, dense = entry.variant, entries[0]
    row = Row(variant.method, variant.asked, variant.method == control, variant.refused)
    if variant.program is None:
        return row
    ideal = 1 / variant.share if variant.share and entry is not dense else None
    speedup = entry.time.speedup if entry.time else None
    return dataclasses.replace(
        row,
        share=variant.share,
        tokens=variant.tokens,
        note=variant.note,
        ideal=ideal,
        scores=_scores(entry, dense, _control(entry, entries, control), seed),
        time=entry.time,
        realised=speedup.median / ideal if speedup and ideal else None,
    )


def _control(entry: _Entry, entries: Sequence[_Entry], control: str) -> _Entry | None:
    """The control at the budget of a row."""
    if entry is entries[0] or entry.variant.method == control:
        return None
    for other in entries:
        if other.variant.method == control and other.variant.asked == entry.variant.budget:
            return other
    return None


def _scores(entry: _Entry, dense: _Entry, control: _Entry | None, seed: int) -> tuple[Score, ...]:
    def against(other: _Entry | None, index: int) -> Difference | None:
        if other is None or other is entry or not other.metrics:
            return None
        return difference(entry.metrics[index], other.metrics[index], seed)

    made = []
    for index, metric in enumerate(entry.metrics):
        made.append(
            Score(
                metric.name,
                metric.value,
                metric.error(seed),
                len(metric.items),
                metric.percent,
                metric.larger_is_better,
                against(dense, index),
                against(control, index),
            )
        )
    return tuple(made)
