"""The chart of a search: quality against cost, every trial faint, the front and the demands marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.compiler.errors import MissingRequirementError
from thresher.compiler.files import atomic_file
from thresher.runtime.charts import DPI, LIGHT

Point = tuple[float, float]  # cost as a share of dense, quality in points above dense


@dataclass(frozen=True)
class FrontChart:
    """What to draw; demands are a largest cost and a least quality, in the units of the points."""

    title: str
    cost: str
    quality: str
    trials: Sequence[Point]
    front: Sequence[Point]
    held_out: Sequence[Point]
    best: Point
    most_cost: float | None = None
    least_quality: float | None = None

    def write(self, file: Path) -> None:
        """Draw into a PNG file.

        Raises:
            MissingRequirementError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingRequirementError(
                f"a plot needs matplotlib ({error}): pip install matplotlib"
            ) from error
        figure = Figure(figsize=(7, 4.4), dpi=DPI, layout="constrained", facecolor="white")
        self._draw(figure.subplots())
        with atomic_file(file) as partial:
            figure.savefig(partial, format="png")

    def _draw(self, panel: Any) -> None:
        quiet = LIGHT.baseline
        panel.plot(*_columns(self.trials), "o", ms=4, color=quiet, alpha=0.45, label="trials")
        panel.plot(*_columns(self.front), "-o", ms=5, color=LIGHT.candidate, label="front")
        panel.plot(
            *_columns(self.held_out), "x", ms=6, color=LIGHT.candidate, label="front, held out"
        )
        panel.plot([1.0], [0.0], "D", ms=6, color=LIGHT.text, label="dense")
        panel.plot(*_columns([self.best]), "o", ms=13, mfc="none", mec=LIGHT.inserted, label="best")
        line = {"color": LIGHT.inserted, "lw": 1, "ls": "--"}
        if self.most_cost is not None:
            panel.axvline(self.most_cost, label="demanded", **line)
        if self.least_quality is not None:
            label = None if self.most_cost is not None else "demanded"
            panel.axhline(self.least_quality, label=label, **line)
        panel.set_xlabel(self.cost)
        panel.set_ylabel(self.quality)
        panel.set_title(self.title, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=LIGHT.line, lw=0.4)
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
