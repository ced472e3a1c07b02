"""CETT, the cumulative error of tail truncation: how much of a network's output small neurons make up.

Luo et al., "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity", ICML 2025.
Neuron i contributes ``n_i = W[:, i] h_i`` to the output, of length ``|h_i| |W[:, i]|``.  With
``D = {i : |n_i| < eps}``, CETT(eps) is the mean over tokens of ``|sum_D n_i| / |sum n_i|``, without bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

POINTS = 64  # thresholds at which a layer is tabulated
ROWS = 4096  # tokens of a layer that are looked at for the table
ABOVE, DECADES = 16, 7.0  # the table ends above the largest contribution of the first rows, so long
Column: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Curve:
    """CETT and sparsity of one layer over rising thresholds, each ``[POINTS]`` float64."""

    eps: Column
    cett: Column
    sparsity: Column

    def threshold(self, cett: float) -> float:
        """The eps at which the layer reaches a CETT; 0 for none, at most the last of the table."""
        return _reached(self.eps, self.cett, cett)

    def sparse(self, share: float) -> float:
        """The eps at which this share of the neurons is dropped."""
        return _reached(self.eps, self.sparsity, share)


def _reached(eps: Column, values: Column, wanted: float) -> float:
    """Where a rising column reaches a value: between two rows by the logarithm of eps, below the first by share."""
    if wanted <= 0:
        return 0.0
    row = min(int(np.searchsorted(values, wanted)), len(values) - 1)
    if row == 0:
        return float(eps[0] * wanted / values[0])
    low, high = values[row - 1], values[row]
    share = min(1.0, (wanted - low) / (high - low)) if high > low else 1.0
    return float(eps[row - 1] * (eps[row] / eps[row - 1]) ** share)


class Cett:
    """Tabulates CETT over a stream of hidden rows ``[T, H]``; at most :data:`ROWS` of them.

    Args:
        weight: ``[O, H]`` of the down projection.
    """

    def __init__(self, weight: Tensor, rows: int = ROWS) -> None:
        self.weight, self.most = weight.float(), rows
        self.norms = self.weight.norm(dim=0)
        self.eps = torch.zeros(POINTS, dtype=torch.float64)
        self.ratio, self.dropped = torch.zeros(2, POINTS, dtype=torch.float64)
        self.count, self.zeros, self.seen = torch.zeros(3, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take ``[T, H]`` more rows."""
        rows = rows.float()
        self.zeros = self.zeros + (rows == 0).sum()
        self.seen = self.seen + rows.numel()
        rows = rows[: max(0, self.most - int(self.count))]
        if not len(rows):
            return
        sizes = rows.abs() * self.norms
        if not self.eps.any():
            top = max(float(sizes.max()), 1e-30) * ABOVE
            self.eps = torch.logspace(-DECADES, 0, POINTS, dtype=torch.float64) * top
        whole = (rows @ self.weight.T).norm(dim=1).clamp(min=1e-30)
        for index, eps in enumerate(self.eps.tolist()):
            small = sizes < eps
            dropped = int(small.count_nonzero())
            if dropped == small.numel():  # and so it is at every higher threshold
                self.ratio[index:] += len(rows)
                self.dropped[index:] += len(rows)
                break
            if dropped:
                lost = (rows * small) @ self.weight.T
                self.ratio[index] += (lost.norm(dim=1) / whole).double().sum()
                self.dropped[index] += dropped / rows.shape[1]
        self.count = self.count + len(rows)

    def curve(self) -> Curve:
        """The table; made monotone, since what is dropped may cancel for a moment."""
        rows = self.count.clamp(min=1.0)
        cett = (self.ratio / rows).cummax(0).values
        return Curve(self.eps.numpy(), cett.numpy(), (self.dropped / rows).numpy())

    @property
    def exact_zeros(self) -> float:
        """Share of the hidden values that are zero."""
        return float(self.zeros / self.seen.clamp(min=1.0))

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        names = ("eps", "ratio", "dropped", "count", "zeros", "seen")
        return {name: getattr(self, name).clone() for name in names}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these sums."""
        for name, value in state.items():
            setattr(self, name, value.clone())


class Union:
    """Share of neurons that any of M tokens in a row needs, over a stream of rows ``[T, H]``.

    Args:
        threshold: ``[H]``; a neuron is needed where ``|h_i - shift|`` is above it.
        shift: subtracted first.
        sizes: the M; a group never reaches over two batches, and a shorter rest is left out.
    """

    def __init__(self, threshold: Tensor, sizes: tuple[int, ...], shift: float = 0.0) -> None:
        self.threshold, self.sizes, self.shift = threshold, sizes, shift
        self.needed, self.groups = torch.zeros(2, len(sizes), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take ``[T, H]`` more rows."""
        active = (rows - self.shift).abs() > self.threshold
        for index, size in enumerate(self.sizes):
            groups = len(active) // size
            if groups:
                any_of = active[: groups * size].reshape(groups, size, -1).any(dim=1)
                self.needed[index] += any_of.double().mean(dim=1).sum()
                self.groups[index] += groups

    def shares(self) -> dict[int, float]:
        """Active share by M, for every M that the data had."""
        pairs = zip(self.sizes, self.needed.tolist(), self.groups.tolist(), strict=True)
        return {size: needed / groups for size, needed, groups in pairs if groups}

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {"needed": self.needed.clone(), "groups": self.groups.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these sums."""
        self.needed, self.groups = state["needed"].clone(), state["groups"].clone()
