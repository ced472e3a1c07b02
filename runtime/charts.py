"""Charts of a profile, as PNG bytes on a transparent ground, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import MissingRequirementError
from thresher.runtime.blocks import BlockProfile
from thresher.runtime.stats import Spread, milliseconds

if TYPE_CHECKING:
    from thresher.runtime.profiling import Profile

INCH, TALL = 0.42, 3.4  # height of one bar and of the chart of blocks
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
    batches = _batches(profile)
    figure, panels = figure_of([_height(profile)] * len(batches), ink)
    for panel, batch in zip(panels, batches, strict=True):
        _draw_latency(panel, profile, batch, ink)
    return png(figure)


def block_chart(profiles: Sequence[BlockProfile], ink: Ink) -> bytes:
    """Time of each block side by side, with what was inserted stacked on top."""
    figure, panels = figure_of([TALL], ink)
    _draw_blocks(panels[0], profiles, ink)
    return png(figure)


def picture(profile: Profile) -> bytes:
    """All charts on one white sheet."""
    batches = _batches(profile)
    heights = [_height(profile)] * len(batches) + [TALL] * bool(profile.blocks)
    figure, panels = figure_of(heights, LIGHT)
    for panel, batch in zip(panels, batches, strict=False):
        _draw_latency(panel, profile, batch, LIGHT)
    if profile.blocks:
        _draw_blocks(panels[-1], profile.blocks, LIGHT)
    figure.set_facecolor("white")
    return png(figure, transparent=False)


def _batches(profile: Profile) -> list[int]:
    return sorted({timing.batch for timing in profile.timings})


def _height(profile: Profile) -> float:
    return INCH * len(profile.candidates) + 0.9


def _draw_latency(panel: Any, profile: Profile, batch: int, ink: Ink) -> None:
    timings = [profile.timing(candidate.name, batch) for candidate in profile.candidates]
    base = timings[0].latency.median
    for row, timing in enumerate(timings):
        _bar(panel, row, timing.latency, ink.candidate if row else ink.baseline, ink)
        if timing.ideal:
            x = 1e3 * base / timing.ideal
            panel.plot([x, x], [row - 0.38, row + 0.38], color=ink.inserted, lw=2, label="ideal")
    panel.set_yticks(range(len(timings)), [timing.candidate for timing in timings])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.12e3 * max(timing.latency.high for timing in timings))
    panel.set_xlabel("milliseconds a run (median; whisker: quartiles)")
    panel.set_title(f"batch {batch}", loc="left", fontsize=10, color=ink.text)
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        style = {"frameon": False, "fontsize": 8, "labelcolor": ink.text}
        panel.legend(handles[:1], labels[:1], loc="lower right", **style)


def _draw_blocks(panel: Any, profiles: Sequence[BlockProfile], ink: Ink) -> None:
    blocks = list(dict.fromkeys(b.block for found in profiles for b in found.blocks))
    width = 0.8 / len(profiles)
    for index, found in enumerate(profiles):
        times = {b.block: b for b in found.blocks}
        at = [i + (index - (len(profiles) - 1) / 2) * width for i in range(len(blocks))]
        own = [1e3 * times[b].own if b in times else 0.0 for b in blocks]
        added = [1e3 * times[b].inserted if b in times else 0.0 for b in blocks]
        colour = ink.candidate if index else ink.baseline
        alpha = max(0.3, 1 - 0.25 * (index - 1)) if index else 1
        panel.bar(at, own, 0.92 * width, label=found.name, color=colour, alpha=alpha)
        if any(added):
            panel.bar(at, added, 0.92 * width, bottom=own, color=ink.inserted, label="inserted")
    slant = {"rotation": 45, "ha": "right"} if len(blocks) > 6 else {}
    panel.set_xticks(range(len(blocks)), blocks, **slant)
    panel.set_ylabel(f"milliseconds a run of batch {profiles[0].batch}")
    handles, labels = panel.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    style = {"frameon": False, "fontsize": 8, "labelcolor": ink.text, "ncols": 3}
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    panel.legend(unique.values(), unique.keys(), **style, **place)


def _bar(panel: Any, row: int, latency: Spread, colour: str, ink: Ink) -> None:
    median = 1e3 * latency.median
    arms = [[median - 1e3 * latency.low], [1e3 * latency.high - median]]
    panel.barh(row, median, 0.62, color=colour)
    panel.errorbar(median, row, xerr=arms, color=ink.text, lw=1, capsize=3)
    panel.annotate(
        milliseconds(latency.median),
        (1e3 * latency.high, row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=ink.text,
    )


def figure_of(heights: Sequence[float], ink: Ink) -> tuple[Any, list[Any]]:
    """A figure of stacked panels without frames; drawn without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingRequirementError(
            f"a report needs matplotlib ({error}): pip install matplotlib"
        ) from error

    figure = Figure(figsize=(8, sum(heights)), dpi=DPI, layout="constrained")
    rows = len(heights)
    panels = list(figure.subplots(rows, 1, squeeze=False, height_ratios=heights)[:, 0])
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


def png(figure: Any, *, transparent: bool = True) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=transparent)
    return buffer.getvalue()
