"""What one vector of kept counts turned out to be worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Quality:
    """Mean score of the reduced model on ``n`` items, paired with the dense model's.

    ``score`` and ``dense`` lie in [0, 1]; ``drop`` is ``dense - score`` and ``standard_error`` that of
    the paired difference.
    """

    score: float
    dense: float
    drop: float
    standard_error: float
    n: int

    @classmethod
    def paired(cls, dense: NDArray[np.float64], found: NDArray[np.float64]) -> Quality:
        """From the scores ``[n]`` of both models; the error is ``sd(dense - found) / sqrt(n)``.

        For scores of 0 and 1 that is McNemar's.
        """
        lost = dense - found
        error = float(lost.std()) / math.sqrt(len(lost))
        means = float(found.mean()), float(dense.mean()), float(lost.mean())
        return cls(*means, error, len(lost))


@dataclass(frozen=True)
class Timing:
    """Measured time of a run: median seconds, and the speed-up over dense with its 95 % interval."""

    seconds: float
    speedup: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """``share``: predicted multiply-accumulates over dense; ``joules``: energy of a run, over dense.

    What was not measured is None.
    """

    quality: Quality
    share: float
    timing: Timing | None = None
    energy: float | None = None

    def cost(self, kind: str) -> float:
        """Relative to the dense model's 1; ``kind`` is ``"time"``, ``"flops"`` or ``"energy"``."""
        if kind == "flops":
            return self.share
        if kind == "energy":
            assert self.energy is not None
            return self.energy
        assert self.timing is not None
        return 1 / self.timing.speedup


Objective = Callable[[Counts], Outcome]
Known = Mapping[Counts, Outcome]
