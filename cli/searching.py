"""What a search evaluates: a vector of kept counts becomes an engine, its quality and its time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from thresher.compiler.contract import Context
from thresher.compiler.errors import MissingRequirementError, UsageError
from thresher.compiler.pipeline import run
from thresher.compiler.recipe import Recipe, load_recipe
from thresher.passes.tokens.methods import TokenReduction
from thresher.passes.tokens.search.outcome import Counts, Outcome, Quality, Timing
from thresher.passes.tokens.search.space import space_of
from thresher.runtime import ProgramRunner, Runnable, export, profile
from thresher.runtime.energy import Counter, counters, joules
from thresher.runtime.judge import Judge
from thresher.runtime.measure import Plan
from thresher.runtime.profiling import batch_inputs

if TYPE_CHECKING:
    from thresher.compiler.program import Program
    from thresher.models.data import Dataset

HEAD = 8  # items of the data that the fingerprint looks at
CONFIRMING = 30  # rounds in which the points of the front are timed once more


@dataclass(frozen=True)
class Setting:
    """How candidates are run and measured."""

    target: str
    precision: str
    batch: int
    threads: int
    cost: str
    rounds: int
    seed: int
    sizes: Mapping[str, int] = field(default_factory=dict)  # of symbolic axes when timing

    @property
    def text(self) -> str:
        """Where candidates run."""
        if self.cost == "flops":
            return "eager torch"
        axes = [("batch", self.batch), *self.sizes.items()]
        sizes = ", ".join(f"{name} {size}" for name, size in axes)
        return f"{self.target} {self.precision}, {sizes}"


class Bench:
    """Evaluates vectors of a method on one model, beside the dense engine.

    Use as a context manager: engines live in a temporary folder.
    """

    def __init__(
        self,
        program: Program,
        method: str,
        settings: Sequence[str],
        data: tuple[Dataset, Dataset],
        setting: Setting,
        *,
        classes: bool,
    ) -> None:
        self.program, self.method, self.settings = program, method, list(settings)
        self.searched, self.held_out = data
        self.setting, self.classes = setting, classes
        self.space = space_of(program, _reduction(self.recipe(None)))
        self.zones, self.energy_note = _zones(setting.cost)
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        """Run the dense model on the searched half, and see how long one evaluation will take."""
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="thresher-")))
        start = time.perf_counter()
        self.dense = self._stack.enter_context(self._opened(self.program, "dense", check=True))
        exported = time.perf_counter() - start
        start = time.perf_counter()
        self.judge = self._judge(self.searched)
        run(self.program, self.recipe(self.space.harshest), Context(seed=self.setting.seed))
        judged_and_rewritten = time.perf_counter() - start
        self.estimate = exported + judged_and_rewritten + self._timing_estimate()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def recipe(self, counts: Counts | None) -> Recipe:
        """The method's recipe with these counts."""
        given = [] if counts is None else [self.space.option(counts)]
        return load_recipe(self.method, [*self.settings, *given])

    def __call__(self, counts: Counts) -> Outcome:
        """The objective: quality on the searched half, share and time."""
        with self._reduced(counts, check=False) as candidate:
            return self._outcome(counts, candidate, self.judge, self.setting.rounds)

    def confirm(self, counts: Counts) -> Outcome:
        """The same on the held-out half, timed longer, with the engine checked against eager."""
        with self._reduced(counts, check=True) as candidate:
            return self._outcome(counts, candidate, self._unseen, CONFIRMING)

    @cached_property
    def _unseen(self) -> Judge:
        return self._judge(self.held_out)

    def fingerprint(self) -> dict[str, str]:
        """Everything about model, method, data and measuring that decides an outcome."""
        setting = self.setting
        return {
            "source": self.program.info.source,
            "weights": _weights_digest(self.program),
            "method": " ".join([self.method, *self.settings]),
            "data": f"{self.searched.name}, {len(self.searched)} items, {_digest(self.searched)}",
            "target": setting.text,
            "cost": setting.cost,
            "seed": str(setting.seed),
        }

    def _judge(self, data: Dataset) -> Judge:
        return Judge(self.dense, data, classes=self.classes, batch=self.setting.batch)

    @contextmanager
    def _reduced(self, counts: Counts, *, check: bool) -> Iterator[Runnable]:
        if counts == self.space.dense:
            yield self.dense
            return
        reduced = run(self.program, self.recipe(counts), Context(seed=self.setting.seed))
        with (
            TemporaryDirectory(dir=self._folder) as folder,
            self._opened(reduced, Path(folder, "engine"), check=check) as candidate,
        ):
            yield candidate

    def _opened(
        self, program: Program, name: str | Path, *, check: bool
    ) -> AbstractContextManager[Runnable]:
        """An engine of the target; where no time is measured, the Program as it is."""
        s = self.setting
        if s.cost == "flops":
            return nullcontext(ProgramRunner(program, threads=s.threads))
        return export(
            program, self._folder / name,
            target=s.target, precision=s.precision, threads=s.threads, check=check,
        )  # fmt: skip

    def _outcome(self, counts: Counts, candidate: Runnable, judge: Judge, rounds: int) -> Outcome:
        quality = Quality.paired(judge.dense, judge(candidate))
        share = self.space.share(counts)
        if self.setting.cost == "flops":
            return Outcome(quality, share)
        return Outcome(quality, share, self._timing(candidate, rounds), self._energy(candidate))

    def _timing(self, candidate: Runnable, rounds: int) -> Timing:
        found = profile(
            [self.dense, candidate],
            batches=[self.setting.batch],
            threads=self.setting.threads,
            plan=Plan(rounds=rounds, warm_up=10),
            sizes=self.setting.sizes,
            memory=False,
        ).timings[1]
        ratio = found.speedup
        assert ratio is not None
        return Timing(found.latency.median, ratio.median, ratio.low, ratio.high)

    def _energy(self, candidate: Runnable) -> float | None:
        """Energy of a run, relative to the dense model's just before."""
        if not self.zones:
            return None
        feeds = batch_inputs(candidate, self.setting.batch, self.setting.sizes)
        dense, found = (
            joules(partial(model.run, feeds), self.zones) for model in (self.dense, candidate)
        )
        return found / dense

    def _timing_estimate(self) -> float:
        """Seconds that timing one candidate takes: each visit is one untimed run and one timed."""
        if self.setting.cost == "flops":
            return 0.0
        feeds = batch_inputs(self.dense, self.setting.batch, self.setting.sizes)
        start = time.perf_counter()
        self.dense.run(feeds)
        return 4 * self.setting.rounds * (time.perf_counter() - start)


def _reduction(recipe: Recipe) -> TokenReduction[Any]:
    """The pass of a recipe whose counts are searched."""
    for one in recipe.build():
        if isinstance(one, TokenReduction):
            return one
    raise UsageError(f"the recipe {recipe.name} reduces no tokens: there is nothing to search")


def _zones(cost: str) -> tuple[list[Counter], str]:
    """Energy counters, and what is to be said about them.

    Raises:
        MissingRequirementError: energy is the cost and cannot be read.
    """
    if cost == "flops":
        return [], "neither time nor energy was measured"
    try:
        return counters(), "energy is that of all processor packages, whatever else ran included"
    except MissingRequirementError as error:
        if cost == "energy":
            raise
        return [], str(error)


def _weights_digest(program: Program) -> str:
    """Of names and values of all weights."""
    import torch

    found = hashlib.sha256()
    held: Mapping[str, Any] = {**program.exported.state_dict, **program.exported.constants}
    for name, value in sorted(held.items()):
        if isinstance(value, torch.Tensor):
            found.update(name.encode())
            found.update(
                value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return found.hexdigest()[:12]


def _digest(data: Dataset) -> str:
    """Of all labels and of the first items."""
    found = hashlib.sha256(b"" if data.labels is None else data.labels.tobytes())
    for name, values in sorted(data.read(range(min(HEAD, len(data)))).items()):
        found.update(name.encode() + values.tobytes())
    return found.hexdigest()[:12]
