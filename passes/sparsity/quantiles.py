"""Quantiles of the sizes in a tensor, and where its values crowd, over a stream of rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BINS, LOWEST, HIGHEST = 16_384, -10.0, 6.0  # decades: bins are 0.2 per cent wide
VALUES = 65_536  # kept to find the mode by
HALVING = 3  # values at which the half-sample mode stops


class Quantiles:
    """Histogram of ``|x - shift| scale`` over all entries, in bins of equal ratio.

    Args:
        scale: ``[C]`` per channel, or None for 1.
        shift: subtracted first.
    """

    def __init__(self, scale: Tensor | None = None, shift: float = 0.0) -> None:
        self.scale, self.shift = scale, shift
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take ``[T, C]`` more rows."""
        sizes = (rows - self.shift).abs()
        sizes = sizes if self.scale is None else sizes * self.scale
        place = (sizes.clamp(min=10**LOWEST).log10() - LOWEST) / (HIGHEST - LOWEST) * BINS
        bins = place.long().clamp(0, BINS - 1).flatten()
        self.counts += torch.bincount(bins, minlength=BINS)

    def at(self, share: float) -> float:
        """The size below which this share of all entries lies; 0 for none of them."""
        if share <= 0:
            return 0.0
        below = self.counts.cumsum(0)
        wanted = share * below[-1]
        index = int(torch.searchsorted(below, wanted))
        before = below[index] - self.counts[index]
        inside = float((wanted - before) / self.counts[index].clamp(min=1.0))
        return float(10 ** (LOWEST + (index + inside) * (HIGHEST - LOWEST) / BINS))

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {"counts": self.counts.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these sums."""
        self.counts = state["counts"].clone()


class Mode:
    """Where the values of a tensor are densest, by the half-sample mode of its first values."""

    def __init__(self) -> None:
        self.values = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Take ``[T, C]`` more rows."""
        room = VALUES - len(self.values)
        if room > 0:
            self.values = torch.cat([self.values, rows.flatten()[:room].float()])

    def value(self) -> float:
        """Bickel (2002): halve the sample again and again to the half that lies closest together."""
        values = self.values.sort().values
        while len(values) > HALVING:
            half = (len(values) + 1) // 2
            widths = values[half - 1 :] - values[: len(values) - half + 1]
            start = int(widths.argmin())
            values = values[start : start + half]
        return float(values.mean()) if len(values) else 0.0

    def state(self) -> dict[str, Tensor]:
        """The values so far."""
        return {"values": self.values.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these values."""
        self.values = state["values"].clone()
