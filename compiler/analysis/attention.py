"""Attention nodes and what their operands are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thresher.compiler.operators import PRODUCTS

SDPA = torch.ops.aten.scaled_dot_product_attention.default
SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
_WEIGHED = (
    *PRODUCTS,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
)


@dataclass(frozen=True)
class Attention:
    """Operands of one attention node: q, k, v ``[B, H, N, d]``, optional mask, scale."""

    node: fx.Node

    @property
    def q(self) -> fx.Node:
        return self._operand(0)

    @property
    def k(self) -> fx.Node:
        return self._operand(1)

    @property
    def v(self) -> fx.Node:
        return self._operand(2)

    @property
    def mask(self) -> fx.Node | None:
        value = self.node.args[3] if len(self.node.args) > 3 else self.node.kwargs.get("attn_mask")
        return value if isinstance(value, fx.Node) else None

    @property
    def scale(self) -> float:
        value = self.node.args[6] if len(self.node.args) > 6 else self.node.kwargs.get("scale")
        return (
            float(value)
            if isinstance(value, (int, float))
            else float(self.q.meta["val"].shape[-1]) ** -0.5
        )

    @property
    def source(self) -> fx.Node | None:
        """What the keys' linear reads, ``[B, N, C]``; None if another product makes the keys."""
        return self._projected(self.k)

    @property
    def input(self) -> fx.Node | None:
        """What the linears of queries, keys and values all read, ``[B, N, C]``; None if there is no such tensor."""
        first, *others = [self._projected(operand) for operand in (self.q, self.k, self.v)]
        return first if all(other is first for other in others) else None

    @staticmethod
    def _projected(operand: fx.Node) -> fx.Node | None:
        """What the linear of an operand reads, ``[B, N, C]``."""
        frontier, seen = [operand], {operand}
        while frontier:
            node = frontier.pop(0)
            if node.target is torch.ops.aten.linear.default:
                found = node.args[0]
                return (
                    found if isinstance(found, fx.Node) and found.meta["val"].dim() == 3 else None
                )
            fresh = [n for n in node.all_input_nodes if n not in seen and n.target not in _WEIGHED]
            frontier += fresh
            seen.update(fresh)
        return None

    def _operand(self, position: int) -> fx.Node:
        operand = self.node.args[position]
        assert isinstance(operand, fx.Node)
        return operand
