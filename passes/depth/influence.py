"""Block influence: how far a part of the network turns the tokens that pass through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from thresher.compiler.analysis.branches import Part
from thresher.compiler.contract import Context
from thresher.compiler.program import Program
from thresher.passes.learning import calibration


class _Stream:
    """The residual stream at one node: its rows now, and how far they turned since other nodes."""

    def __init__(self) -> None:
        self.rows = torch.empty(0)
        self.since: dict[_Stream, Tensor] = {}  # sum of 1 - cos, and rows

    def add(self, rows: Tensor) -> None:
        """Take ``[T, C]`` of the batch that runs."""
        for before, sums in self.since.items():
            turned = 1 - F.cosine_similarity(before.rows.double(), rows.double(), dim=-1)
            sums += torch.stack([turned.sum(), torch.tensor(float(len(rows)), dtype=torch.float64)])
        self.rows = rows

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {str(i): sums.clone() for i, sums in enumerate(self.since.values())}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these sums."""
        for i, sums in enumerate(self.since.values()):
            sums.copy_(state[str(i)])


def influences(
    program: Program, parts: Sequence[Part], context: Context, items: Sequence[int], name: str
) -> list[float]:
    """Of each part ``1 - mean cos(x, x')`` over tokens that are no padding, x' being the stream behind it.

    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024.
    Where tokens leave inside of a part, its pieces before and behind are added up.
    """
    streams: dict[fx.Node, _Stream] = {}
    spans = [[_pair(streams, *span) for span in part.spans] for part in parts]
    order = [node for node in program.graph.nodes if node in streams]
    fingerprint = {"parts": [part.name for part in parts]}
    collectors = {node: streams[node] for node in order}
    calibration.collect(program, context, items, collectors, name, fingerprint)
    return [sum(float(sums[0] / sums[1]) for sums in pairs) for pairs in spans]


def _pair(streams: dict[fx.Node, _Stream], before: fx.Node, behind: fx.Node) -> Tensor:
    first, second = (streams.setdefault(node, _Stream()) for node in (before, behind))
    return second.since.setdefault(first, torch.zeros(2, dtype=torch.float64))
