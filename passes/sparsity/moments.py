"""Means, variances and mean sizes of channels, summed over a stream of rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Moments:
    """Sums over rows ``[T, C]`` in float64; variances by the parallel update of Chan et al."""

    def __init__(self, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean, self.spread, self.size = torch.zeros(3, channels, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take ``[T, C]`` more rows."""
        if not len(rows):
            return
        rows = rows.double()
        mean, before, more = rows.mean(0), self.count, float(len(rows))
        step, total = mean - self.mean, before + more
        self.spread = (
            self.spread + (rows - mean).square().sum(0) + step.square() * before * more / total
        )
        self.mean = self.mean + step * more / total
        self.size = self.size + rows.abs().sum(0)
        self.count = total

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {"count": self.count, "mean": self.mean, "spread": self.spread, "size": self.size}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these sums."""
        self.count, self.mean = state["count"], state["mean"]
        self.spread, self.size = state["spread"], state["size"]

    def tensors(self) -> dict[str, Tensor]:
        """``mean``, ``variance`` and ``magnitude`` (the mean of ``|x|``) of every channel, float32 ``[C]``."""
        rows = self.count.clamp(min=1.0)
        found = {"mean": self.mean, "variance": self.spread / rows, "magnitude": self.size / rows}
        return {name: value.float() for name, value in found.items()}
