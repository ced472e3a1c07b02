"""Statistics of interleaved timings.  Distribution-free, as running times are skewed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median with its interquartile range, in the unit of the values."""

    median: float
    low: float
    high: float
    n: int

    @property
    def relative(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with a confidence interval of the median.

    ``confidence`` is the true coverage of the order-statistics interval, at least 0.95 unless there
    are fewer than six pairs.
    """

    median: float
    low: float
    high: float
    confidence: float
    n: int

    @property
    def inside_noise(self) -> bool:
        """Whether no difference (a ratio of 1) cannot be excluded."""
        return self.low <= 1.0 <= self.high


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> Ratio:
    """Speed-up of the candidate: the median over rounds of baseline / candidate."""
    return median_interval([a / b for a, b in zip(baseline, candidate, strict=True)])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Interval of the median from order statistics.

    With n independent values, the median lies between the k-th smallest and the k-th largest with
    probability ``1 - 2 P(Binomial(n, 1/2) < k)``; the largest k that keeps ``confidence`` is used.
    """
    ordered = sorted(values)
    n = len(ordered)
    tail, k, below = 0.5**n, 1, 0.5**n
    while 2 * k < n:
        below += math.comb(n, k) * 0.5**n
        if 1 - 2 * below < confidence:
            break
        tail, k = below, k + 1
    return Ratio(statistics.median(ordered), ordered[k - 1], ordered[n - k], 1 - 2 * tail, n)


def settled(values: Sequence[float], window: int = 5, threshold: float = 0.05) -> bool:
    """Whether the last ``window`` values lie within ``threshold`` of their median."""
    last = values[-window:]
    return len(last) == window and max(last) - min(last) <= threshold * statistics.median(last)


def milliseconds(seconds: float) -> str:
    """Three digits, and more before the point where there are more: ``"1.23"``, ``"1120"``."""
    value = 1e3 * seconds
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
