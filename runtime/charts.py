"""Charts of a profile, as PNG bytes on a transparent ground, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import missing_extra
from thresher.runtime.blocks import BlockProfile
from thresher.runtime.stats import Spread

if TYPE_CHECKING:
    from thresher.runtime.profiling import Profile

INCH = 0.42  # height of one bar
DPI = 144


@dataclass(frozen=True)
class Ink:
    """Colours of one appearance."""

    text: str
    line: str
    baseline: str
    candidate: str
    inserted: str


LIGHT = Ink("#333333", "#c8c8c8", "#a3a9b0", "#3b73a8", "#c9782f")
DARK = Ink("#d8d8d8", "#4c4c4c", "#747b83", "#6ea3d4", "#dd9a57")


def latency_chart(profile: Profile, ink: Ink) -> bytes:
    """One panel for each batch size: time of a run with quartiles, and the ideal as a mark."""
    batches = sorted({timing.batch for timing in profile.timings})
    bars = len(profile.candidates)
    figure, panels = _figure(len(batches), INCH * bars + 0.9, ink)
    for panel, batch in zip(panels, batches, strict=True):
        timings = [profile.timing(c.name, batch) for c in profile.candidates]
        base = timings[0].latency.median
        for row, timing in enumerate(timings):
            colour = ink.candidate if row else ink.baseline
            _bar(panel, row, timing.latency, colour, ink)
            if timing.ideal:
                x = 1e3 * base / timing.ideal
                label = "ideal" if row == 1 else None
                panel.plot([x, x], [row - 0.38, row + 0.38], color=ink.inserted, lw=2, label=label)
        panel.set_yticks(range(bars), [c.name for c in profile.candidates])
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.margins(x=0.22)
        panel.set_xlabel("milliseconds a run (median; whisker: quartiles)")
        panel.set_title(f"batch {batch}", loc="left", fontsize=10, color=ink.text)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8, labelcolor=ink.text, loc="lower right")
    return _png(figure)


def block_chart(profiles: Sequence[BlockProfile], ink: Ink) -> bytes:
    """Time of each block side by side, with what was inserted stacked on top."""
    blocks = list(dict.fromkeys(b.block for found in profiles for b in found.blocks))
    figure, (panel,) = _figure(1, 3.0, ink)
    width = 0.8 / len(profiles)
    for index, found in enumerate(profiles):
        times = {b.block: b for b in found.blocks}
        at = [i + (index - (len(profiles) - 1) / 2) * width for i in range(len(blocks))]
        own = [1e3 * times[b].own if b in times else 0.0 for b in blocks]
        added = [1e3 * times[b].inserted if b in times else 0.0 for b in blocks]
        shade = {"color": ink.candidate, "alpha": 1 - 0.25 * (index - 1)} if index else {}
        panel.bar(at, own, 0.92 * width, label=found.name, **(shade or {"color": ink.baseline}))
        if any(added):
            label = f"inserted in {found.name}"
            panel.bar(at, added, 0.92 * width, bottom=own, color=ink.inserted, label=label)
    slant = {"rotation": 45, "ha": "right"} if len(blocks) > 6 else {}
    panel.set_xticks(range(len(blocks)), blocks, **slant)
    panel.set_ylabel("milliseconds a run")
    panel.legend(frameon=False, fontsize=8, labelcolor=ink.text)
    return _png(figure)


def _bar(panel: Any, row: int, latency: Spread, colour: str, ink: Ink) -> None:
    median = 1e3 * latency.median
    arms = [[median - 1e3 * latency.low], [1e3 * latency.high - median]]
    panel.barh(row, median, 0.62, color=colour)
    panel.errorbar(median, row, xerr=arms, color=ink.text, lw=1, capsize=3)
    panel.annotate(
        f"{median:.3g}",
        (1e3 * latency.high, row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=ink.text,
    )


def _figure(rows: int, height: float, ink: Ink) -> tuple[Any, list[Any]]:
    """A figure of stacked panels without frames; drawn without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report", "a report") from error

    figure = Figure(figsize=(8, height * rows), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for panel in panels:
        panel.set_facecolor("none")
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(ink.line)
        panel.tick_params(colors=ink.text, labelsize=9, length=3, color=ink.line)
        panel.xaxis.label.set_color(ink.text)
        panel.yaxis.label.set_color(ink.text)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    return figure, panels


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()
