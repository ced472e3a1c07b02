"""Routers of token skipping: a linear probe of how much a part of the network will change a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.branches import Part
from thresher.compiler.contract import Context
from thresher.compiler.program import Program
from thresher.passes.learning import calibration

RIDGE = 1e-3  # of the mean variance


class _Entry:
    """Keeps the rows of the stream before a part."""

    def __init__(self) -> None:
        self.rows = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Take ``[T, C]`` of the batch that runs."""
        self.rows = rows.double()

    def state(self) -> dict[str, Tensor]:
        """Nothing is summed here."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is summed here."""


class Probe(_Entry):
    """Least squares from the stream ``x [T, C]`` before a part to the length of what it adds.

    It is the collector of the stream behind the part, which is the one before the next part too.
    """

    def __init__(self, before: _Entry, width: int) -> None:
        super().__init__()
        self.before = before
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.moment = torch.zeros(width + 1, dtype=torch.float64)
        self.square = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take ``[T, C]`` of the batch that runs."""
        super().add(rows)
        x = torch.nn.functional.pad(self.before.rows, (0, 1), value=1.0)
        length = (self.rows - self.before.rows).norm(dim=1)
        self.gram += x.T @ x
        self.moment += x.T @ length
        self.square += length.square().sum()

    def solve(self) -> Tensor:
        """``[C + 1]`` float32 weights and bias, lightly regularised."""
        mean = self.gram[:-1, -1:] / self.gram[-1, -1]
        variance = self.gram.diagonal()[:-1].mean() / self.gram[-1, -1] - mean.square().mean()
        penalty = torch.full_like(self.moment, float(RIDGE * variance * self.gram[-1, -1]))
        penalty[-1] = 0.0
        solved: Tensor = torch.linalg.lstsq(
            self.gram + penalty.diag(), self.moment[:, None], driver="gelsd"
        ).solution[:, 0]
        return solved.float()

    def channels(self) -> tuple[Tensor, Tensor]:
        """``[C]`` float32 means and standard deviations of the stream's channels."""
        count = self.gram[-1, -1]
        mean = self.gram[:-1, -1] / count
        variance = self.gram.diagonal()[:-1] / count - mean.square()
        return mean.float(), variance.clamp(min=1e-12).sqrt().float()

    def spread(self, weights: Tensor) -> float:
        """Standard deviation of ``weights [C]`` times the stream."""
        w, count = weights.double(), self.gram[-1, -1]
        mean = w @ self.gram[:-1, -1] / count
        square = w @ self.gram[:-1, :-1] @ w / count
        return float((square - mean.square()).clamp(min=1e-24).sqrt())

    def explained(self, weights: Tensor) -> float:
        """Share of the variance of the lengths that the weights explain (R squared)."""
        w, count = weights.double(), self.gram[-1, -1]
        error = self.square - 2 * w @ self.moment + w @ self.gram @ w
        total = self.square - self.moment[-1].square() / count
        return float(1 - error / total) if total > 0 else 0.0

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {name: getattr(self, name).clone() for name in ("gram", "moment", "square")}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these sums."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


def fitted(
    program: Program, parts: Sequence[Part], context: Context, items: Sequence[int], name: str
) -> dict[str, Probe]:
    """By part the probe, fitted on items of the data.

    Padding is left out; prefix tokens, which are few, are not.
    """
    collectors: dict[fx.Node, _Entry] = {}
    probes = dict[str, Probe]()
    for part in parts:
        ((before, behind),) = part.spans
        entry = collectors.setdefault(before, _Entry())
        probe = Probe(entry, int(before.meta["val"].shape[-1]))
        probes[part.name] = collectors[behind] = probe
    order = [node for node in program.graph.nodes if node in collectors]
    fingerprint = {"parts": [part.name for part in parts]}
    calibration.collect(
        program, context, items, {n: collectors[n] for n in order}, name, fingerprint
    )
    return probes
