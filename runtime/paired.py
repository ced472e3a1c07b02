"""Paired statistics: two models scored on the same items, and how sure their difference is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]

RESAMPLES = 1000  # of the bootstrap: its error is then good to about 2 %


@dataclass(frozen=True)
class Metric:
    """One score of one model on a test set.

    ``items`` ``[n, ...]`` is what each test item contributes; the score is their mean, or what
    ``statistic`` makes of any choice of them.  Whole numbers (right or wrong, errors) are outcomes,
    whose flips are counted.
    """

    name: str
    items: Values
    statistic: Callable[[Values], float] | None = None
    larger_is_better: bool = True

    @property
    def value(self) -> float:
        """The score."""
        return self.of(self.items)

    @property
    def outcomes(self) -> bool:
        """Whether items are outcomes that can be counted."""
        return self.items.dtype.kind in "biu"

    @property
    def percent(self) -> bool:
        """Whether the score is a share of the items."""
        return self.items.dtype.kind == "b"

    def of(self, items: Values) -> float:
        """The score of some items."""
        return float(items.mean()) if self.statistic is None else self.statistic(items)

    def error(self, seed: int = 0) -> float:
        """Standard error of the score."""
        if self.statistic is None:
            return _error_of_mean(self.items.astype(np.float64))
        return _bootstrap(lambda chosen: self.of(self.items[chosen]), len(self.items), seed)


@dataclass(frozen=True)
class Difference:
    """Score minus a reference's on the same items.

    ``sigmas`` is the difference in standard errors, positive where the score is better; ``worse``
    and ``better`` count the outcomes that changed, None where there are no outcomes.
    """

    value: float
    error: float
    sigmas: float
    worse: int | None = None
    better: int | None = None


def difference(metric: Metric, reference: Metric, seed: int = 0) -> Difference:
    """Paired difference and its standard error.

    Of means, the error is that of the mean of the items' differences, which for right and wrong is
    McNemar's.  Of other statistics it is found by resampling items (the bootstrap, Efron, 1979).
    """
    value = metric.value - reference.value
    if metric.statistic is None:
        error = _error_of_mean(metric.items.astype(np.float64) - reference.items)
    else:
        error = _bootstrap(
            lambda chosen: metric.of(metric.items[chosen]) - reference.of(reference.items[chosen]),
            len(metric.items),
            seed,
        )
    gain = value if metric.larger_is_better else -value
    sigmas = gain / error if error else math.copysign(math.inf, gain) if gain else 0.0
    if not metric.outcomes:
        return Difference(value, error, sigmas)
    rose = int((metric.items > reference.items).sum())
    fell = int((metric.items < reference.items).sum())
    worse, better = (fell, rose) if metric.larger_is_better else (rose, fell)
    return Difference(value, error, sigmas, worse, better)


def _error_of_mean(items: NDArray[np.float64]) -> float:
    return float(items.std() / math.sqrt(len(items)))


def _bootstrap(score: Callable[[NDArray[np.int64]], float], count: int, seed: int) -> float:
    """Standard deviation of a score over sets of items drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = [score(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    return float(np.std(drawn, ddof=1))
