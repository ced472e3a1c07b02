"""A picture of learned counts: tokens after each block, and how loss and cost got there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRUNED, MERGED, LEFT = "#d95f4c", "#e6b84c", "#3b6ea5"


def draw(details: Mapping[str, Any], path: Path) -> None:
    """Write a PNG from the details of a pass that learned its counts."""
    from matplotlib.figure import Figure

    tokens, history = details["tokens"], details["learning"]["history"]
    blocks = range(1, len(tokens))
    pruned = [
        _pruned(text, before) for text, before in zip(details["schedule"], tokens, strict=False)
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=[2, 1])
    bars.bar(blocks, tokens[:-1], color=PRUNED, label="pruned here")
    bars.bar(blocks, pruned, color=MERGED, label="merged here")
    bars.bar(blocks, tokens[1:], color=LEFT, label="left")
    bars.set(xlabel="block", ylabel="tokens", title="Tokens in front of and behind each block")
    bars.set_xticks(list(blocks))
    bars.legend(frameon=False)
    steps = [i * details["learning"]["steps"] / max(1, len(history)) for i in range(len(history))]
    curve.plot(steps, [row[0] for row in history], color=LEFT, label="loss of the task")
    curve.plot(steps, [row[1] for row in history], color=PRUNED, label="share of the dense work")
    curve.set(xlabel="step", title="Learning")
    curve.legend(frameon=False)
    for panel in (bars, curve):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _pruned(schedule: str, before: int) -> int:
    """Tokens after pruning, from a Count such as ``=180>170``."""
    head, arrow, _ = schedule.removeprefix("=").partition(">")
    return min(int(head), before) if arrow else before
