"""A comparison as one picture: quality against measured time, a line for each method.

Rows called ``METHOD@SETTING`` are one method at settings of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from thresher.runtime.charts import LIGHT, figure_of, png
from thresher.runtime.comparing import Comparison, Row

TALL = 4.6  # inches of one metric's panel
LABEL = 0.1  # of a panel's width, that a label takes
# Okabe and Ito's palette, which people with any colour vision can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
CONTROL_COLOUR = "#8a8a8a"
MARKERS = "osD^vP"


def comparison_chart(found: Comparison, title: str) -> bytes:
    """PNG bytes; one panel for each metric.

    Error bars are standard errors of the paired difference to the dense model, across, and
    quartiles of the times, along; the band around the dense model is its own standard error.
    """
    names = [score.name for score in found.rows[0].scores]
    figure, panels = figure_of([TALL] * len(names), LIGHT)
    for index, (panel, name) in enumerate(zip(panels, names, strict=True)):
        _draw(panel, found, index)
        panel.set_ylabel(name)
        panel.set_xlabel(f"milliseconds a batch of {found.batch} (median; whisker: quartiles)")
    panels[0].set_title(title, loc="left", fontsize=10, color=LIGHT.text)
    figure.set_facecolor("white")
    return png(figure, transparent=False)


def _draw(panel: Any, found: Comparison, index: int) -> None:
    dense = found.rows[0]
    score = dense.scores[index]
    scale = 100 if score.percent else 1
    low, high = (scale * (score.value + sign * score.error) for sign in (-1, 1))
    panel.axhline(scale * score.value, color=LIGHT.text, lw=1, label="dense")
    panel.axhspan(low, high, color=LIGHT.line, alpha=0.35, lw=0, label="± its standard error")
    _point(panel, dense, index, {"color": LIGHT.text, "marker": "*", "markersize": 10})
    drawn = [row for row in found.rows[1:] if row.time is not None]
    styles = _styles()
    for method, rows in _lines(drawn).items():
        style: dict[str, Any] = {"color": CONTROL_COLOUR, "ls": "--", "marker": "x"}
        if not rows[0].control:
            colour, marker = next(styles)
            style = {"color": colour, "ls": "-", "marker": marker}
        at = [(_milliseconds(row), scale * row.scores[index].value) for row in rows]
        panel.plot(*zip(*at, strict=True), lw=1.3, markersize=5, label=method, **style)
        for row in rows:
            _point(panel, row, index, style)
    _shares(panel, drawn)
    panel.grid(color=LIGHT.line, lw=0.5, alpha=0.6)
    panel.margins(x=0.06, y=0.14)
    if score.percent:
        panel.yaxis.set_major_formatter("{x:g}%")
    panel.legend(frameon=False, fontsize=8, labelcolor=LIGHT.text, loc="lower right")


def _lines(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each method, in the order of the table, from fast to slow."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method.partition("@")[0], []).append(row)
    return {name: sorted(own, key=_milliseconds) for name, own in found.items()}


def _styles() -> Iterator[tuple[str, str]]:
    """Colours and markers; when the colours are used up, the markers are shifted."""
    for shift in itertools.count():
        for index, colour in enumerate(COLOURS):
            yield colour, MARKERS[(index + shift) % len(MARKERS)]


def _point(panel: Any, row: Row, index: int, style: dict[str, Any]) -> None:
    """A marker with both error bars."""
    score = row.scores[index]
    scale = 100 if score.percent else 1
    assert row.time is not None
    spread, at = row.time.latency, _milliseconds(row)
    panel.errorbar(
        at,
        scale * score.value,
        xerr=[[at - 1e3 * spread.low], [1e3 * spread.high - at]],
        yerr=scale * score.against_dense.error if score.against_dense else None,
        elinewidth=1,
        capsize=2.5,
        **{"markersize": 5, **style, "ls": "none"},
    )


def _shares(panel: Any, rows: list[Row]) -> None:
    """The share of the work that is left, above the points of each budget that was asked for."""
    for budget, place in _labels(rows).items():
        panel.text(
            place,
            0.985,
            f"{100 * budget:.3g}% work",
            transform=panel.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=8,
            color=LIGHT.text,
        )


def _labels(rows: list[Row]) -> dict[float, float]:
    """Budgets with the mean of their times; of those that would be written over each other the first."""
    times: dict[float, list[float]] = {}
    for row in rows:
        if row.asked is not None:
            times.setdefault(row.asked, []).append(_milliseconds(row))
    drawn = [_milliseconds(row) for row in rows]
    wide, last, found = LABEL * (max(drawn, default=0) - min(drawn, default=0)), -math.inf, {}
    places = {budget: sum(own) / len(own) for budget, own in times.items()}
    for budget, place in sorted(places.items(), key=lambda item: item[1]):
        if place - last >= wide:
            found[budget] = last = place
    return found


def _milliseconds(row: Row) -> float:
    assert row.time is not None
    return 1e3 * row.time.latency.median
