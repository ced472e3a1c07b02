"""How fast a training moves, and when it has come to rest."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
