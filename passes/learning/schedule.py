"""How fast a training moves, when it has come to rest, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

TOLD = 60  # rows of a history, about
Row = TypeVar("Row")


def thinned(history: Sequence[Row]) -> list[Row]:
    """Some of the rows, evenly: about :data:`TOLD`, and fewer than twice as many."""
    return list(history[:: max(1, len(history) // TOLD)])


def cosine(rate: float, step: int, limit: int) -> float:
    """The learning rate of a step: half a cosine from ``rate`` at step 0 to 0 at the limit."""
    return rate * (1 + math.cos(math.pi * step / limit)) / 2


def settled(losses: Sequence[float], patience: int) -> bool:
    """Whether the mean of the last losses is no lower than that of as many before.

    Judged every ``patience`` steps; False in between.
    """
    if len(losses) < 2 * patience or len(losses) % patience:
        return False
    return sum(losses[-patience:]) >= sum(losses[-2 * patience : -patience])
