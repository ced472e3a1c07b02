"""What a search ends with: the front, confirmed on unseen data, as data, plot, recipes and a verdict."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.cli.board import cells
from thresher.cli.console import Progress, table
from thresher.compiler.errors import VerdictError
from thresher.compiler.files import atomic_file
from thresher.passes.tokens.search.front import Demands, best, front
from thresher.passes.tokens.search.outcome import Counts, Known, Outcome, Quality
from thresher.passes.tokens.search.strategy import Strategy
from thresher.runtime.conditions import Conditions, conditions, load_average
from thresher.runtime.front_chart import FrontChart, Point
from thresher.runtime.judge import MEASURES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from thresher.cli.searching import Bench

FRONT, PLOT, BEST = "front.json", "front.png", "best.yaml"
AXES = {
    "time": "time of a run, relative to dense (measured)",
    "flops": "multiply-accumulates, relative to dense (predicted)",
    "energy": "energy of a run, relative to dense (measured)",
}


@dataclass(frozen=True)
class Found:
    """A point of the front: as the search saw it, and on the held-out half, timed once more."""

    name: str
    counts: Counts
    searched: Outcome
    confirmed: Outcome

    @property
    def judged(self) -> Outcome:
        """What it is chosen by: the searched half's quality, and times that chose nothing."""
        return dataclasses.replace(self.confirmed, quality=self.searched.quality)


@dataclass(frozen=True)
class Findings:
    """The end of a search."""

    bench: Bench
    strategy: str
    demands: Demands
    known: Known
    points: tuple[Found, ...]
    finished: bool
    conditions: Conditions

    @cached_property
    def best(self) -> Found:
        """The point that answers the demands, or comes nearest."""
        judged = {point.counts: point.judged for point in self.points}
        counts = best(judged, self.demands, self.bench.setting.cost)
        return next(point for point in self.points if point.counts == counts)

    @cached_property
    def missed(self) -> list[str]:
        """The demands that the best point does not meet; quality is judged on the held-out half."""
        demands, found = self.demands, self.best.confirmed
        missed = []
        if not demands.spends(found):
            speed = f"a measured speed-up of {demands.speedup:g}" if demands.speedup else ""
            missed.append(speed or f"a share of {demands.flops:g} of the multiply-accumulates")
        if not demands.keeps(found.quality):
            missed.append(f"at most {100 * (demands.drop or 0):g} points lost on the held-out half")
        if demands.lossless and not demands.harmless(self.best.searched.quality):
            missed.append("no drop of quality on the searched half")
        return missed

    @property
    def met(self) -> bool:
        """Whether every demand is met."""
        return not self.missed

    @property
    def sentences(self) -> list[str]:
        """The verdict first, then what a reader must know about the numbers."""
        asked = self.demands != Demands()
        verdict = (
            f"not met: {' and '.join(self.missed)}; the best point found" if self.missed else ""
        )
        verdict = verdict or ("all demands are met by" if asked else "the best is")
        said = [f"{verdict} {self.best.name}, which {self.describe(self.best)}"]
        if not self.finished:
            said.append(f"{self.strategy} was not at its end: more --trials go on from here")
        said.append(
            "the points were chosen on the searched half, whose numbers are therefore optimistic;"
            " the held-out half chose nothing"
        )
        said.append(self.bench.energy_note)
        busy = self.conditions.busy if self.bench.setting.cost != "flops" else None
        return said + ([busy] if busy else [])

    def describe(self, point: Found) -> str:
        """One point in words."""
        timing = point.confirmed.timing
        speed = (
            f", is {timing.speedup:.2f} times as fast as dense ({timing.low:.2f} to {timing.high:.2f})"
            if timing
            else ""
        )
        held_out, searched = point.confirmed.quality, point.searched.quality
        return (
            f"spends {point.searched.share:.1%} of the multiply-accumulates{speed} and has"
            f" {self.bench.judge.measure} {_against(held_out)} on {held_out.n} held-out items,"
            f" {_against(searched)} on the {searched.n} searched"
        )

    def tables(self) -> list[RenderableType]:
        """The front, searched and held-out quality side by side."""
        dense = self.points[0]
        head = (
            "", "searched", "held out", "points lost", "error", "cost", "speed-up", "energy",
            "tokens after each block",
        )  # fmt: skip
        qualities = dense.searched.quality.dense, dense.confirmed.quality.dense
        rows = [("dense", *(f"{q:.2%}" for q in qualities), "", "", "100.0%", "1.00x", "", "")]
        for point in self.points:
            tokens, quality, share, speed = cells(point.counts, point.judged)
            unseen = point.confirmed.quality
            energy = point.confirmed.energy
            rows.append(
                (
                    point.name + " *" * (point is self.best),
                    quality,
                    f"{unseen.score:.2%}",
                    f"{100 * unseen.drop:.2f}",
                    f"{100 * unseen.standard_error:.2f}",
                    share,
                    speed,
                    "" if energy is None else f"{energy:.1%}",
                    tokens,
                )
            )
        title = (
            f"Front of {len(self.known)} schedules, {MEASURES[self.bench.judge.measure]} (* best)"
        )
        return [table(title, head, rows)]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        dense = self.points[0]
        return {
            **self.bench.fingerprint(),
            "strategy": self.strategy,
            "finished": self.finished,
            "measure": self.bench.judge.measure,
            "demands": asdict(self.demands),
            "met": self.met,
            "best": self.best.name,
            "sentences": self.sentences,
            "dense": {
                "searched": dense.searched.quality.dense,
                "held_out": dense.confirmed.quality.dense,
            },
            "front": [
                {
                    "name": point.name,
                    "counts": point.counts,
                    "share": point.searched.share,
                    "searched": asdict(point.searched.quality),
                    "held_out": asdict(point.confirmed.quality),
                    "searched_timing": _plain(point.searched.timing),
                    "timing": _plain(point.confirmed.timing),
                    "energy": point.confirmed.energy,
                }
                for point in self.points
            ],
            "trials": [{"counts": c, **asdict(outcome)} for c, outcome in self.known.items()],
            "conditions": asdict(self.conditions),
        }

    def files(self, folder: Path) -> list[str]:
        """What :meth:`write` writes."""
        names = [FRONT, PLOT, BEST, *(f"{point.name}.yaml" for point in self.points)]
        return [str(folder / name) for name in names]

    def write(self, folder: Path) -> None:
        """Data, plot and recipes; the points of an earlier call are removed."""
        data = {"schema": "thresher.search/1", **self.to_json()}
        recipes = {f"{point.name}.yaml": self.recipe(point) for point in self.points}
        for old in folder.glob("point-*.yaml"):
            if old.name not in recipes:
                old.unlink()
        texts = {FRONT: json.dumps(data, indent=2), BEST: self.recipe(self.best), **recipes}
        for name, text in texts.items():
            with atomic_file(folder / name) as partial:
                partial.write_text(text, encoding="utf-8")
        self.chart().write(folder / PLOT)

    def recipe(self, point: Found) -> str:
        """The recipe of a point, whose summary says where it was found."""
        bench = self.bench
        recipe = bench.recipe(point.counts)
        summary = (
            f"{recipe.name} by {self.strategy}, learned on {bench.searched.name}"
            f" ({len(bench.searched)} items searched, {len(bench.held_out)} held out) for"
            f" {bench.setting.text}; it {self.describe(point)}."
        )
        name = f"{recipe.name}-{self.strategy}-{point.name}"
        return dataclasses.replace(recipe, name=name, summary=summary).to_yaml()

    def chart(self) -> FrontChart:
        """Quality against cost, both relative to dense; each half to the dense model on that half."""
        cost, demands = self.bench.setting.cost, self.demands

        def at(outcome: Outcome, quality: Quality) -> Point:
            return outcome.cost(cost), -100 * quality.drop

        most = {"flops": demands.flops, "time": demands.speedup and 1 / demands.speedup}.get(cost)
        return FrontChart(
            title=f"{self.bench.method} by {self.strategy}: {len(self.known)} schedules",
            cost=AXES[cost],
            quality=f"{self.bench.judge.measure}, points above dense",
            trials=[at(outcome, outcome.quality) for outcome in self.known.values()],
            front=[at(p.judged, p.searched.quality) for p in self.points],
            held_out=[at(p.confirmed, p.confirmed.quality) for p in self.points],
            best=at(self.best.judged, self.best.searched.quality),
            most_cost=most,
            least_quality=None if demands.drop is None else -100 * demands.drop,
        )


def conclude(
    known: Known, strategy: Strategy, bench: Bench, demands: Demands, tell: Progress
) -> Findings:
    """Measure the front once more, on the half that the search did not see.

    Raises:
        VerdictError: there is nothing on it.
    """
    if not known:
        raise VerdictError("the search evaluated nothing, as the method can remove nothing here")
    cost, load = bench.setting.cost, load_average()
    vectors = front(known, cost)
    answer = best(known, demands, cost)
    if answer not in vectors:
        vectors = sorted([*vectors, answer], key=lambda counts: known[counts].cost(cost))
    points = []
    for number, counts in enumerate(vectors, 1):
        tell("confirming the front on the held-out half", number - 1, len(vectors))
        name = f"point-{number:02d}"
        points.append(Found(name, counts, known[counts], bench.confirm(counts)))
    where = conditions(bench.setting.threads, load)
    finished = not strategy.unfinished(known)
    return Findings(bench, strategy.name, demands, known, tuple(points), finished, where)


def _against(quality: Quality) -> str:
    return (
        f"{quality.score:.2%} (dense {quality.dense:.2%}, standard error of the difference"
        f" {100 * quality.standard_error:.2f} points)"
    )


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
