"""Where tokens may be reduced, and what is known of the token sequence.

A *site* is the residual add after a self-attention (after the LayerNorm behind it in post-norm
models): from there on fewer tokens may flow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from thresher.compiler.analysis.attention import Attention
from thresher.compiler.analysis.axes import Axes
from thresher.compiler.program import Refusal

TOKEN_AXIS = 1  # of the residual stream [batch, token, channel]


@dataclass(frozen=True)
class Site:
    """A place where the token count may drop: after ``stream`` of block ``layer``."""

    layer: int
    attention: Attention
    stream: fx.Node
    path: str


@dataclass
class Sites:
    """Result of the search: usable sites, refusals, and facts about the token sequence.

    Attributes:
        token: dimension variable of the token axis, or None when no self-attention was found.
        protected: number of prefix tokens (class, distillation, registers) that never go.
        class_token: index of the prefix token that the model reads out, or that a parameter's name
            calls a class token; None where there is neither.
        root: the residual stream before the first block; what does not depend on it is side
            information (position tables, masks) and follows the tokens.
        blocks: how many blocks :attr:`Site.layer` counts, those whose site was refused later included.
        late: nodes behind the last attention that need every token: tokens are restored for them.
        shares: softmaxes over the tokens behind the last attention that only weigh sums over the tokens
            (sequence pooling): they need no token in its place.
    """

    axes: Axes
    token: int | None = None
    tokens: int | torch.SymInt = 0
    protected: int = 0
    class_token: int | None = None
    root: fx.Node | None = None
    blocks: int = 0
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    late: set[fx.Node] = field(default_factory=set)
    shares: set[fx.Node] = field(default_factory=set)
    padding: fx.Node | None = None

    @cached_property
    def offsets(self) -> dict[int, int]:
        """Token-like variables to their length less the token count (0: the axis itself)."""
        return {} if self.token is None else self.axes.variables.offsets(self.token)

    def token_axes(self, node: fx.Node) -> dict[int, int]:
        """Axes of a tensor that run over tokens: axis to offset."""
        if not self.axes.has(node):
            return {}
        return {i: self.offsets[v] for i, v in enumerate(self.axes.of(node)) if v in self.offsets}

    def carries_tokens(self, node: fx.Node) -> bool:
        """Whether any tensor that a node yields runs over tokens."""
        find = self.axes.variables.find
        return any(find(v) in self.offsets for tensor in self.axes.tensors(node) for v in tensor)

    def pools(self, node: fx.Node) -> bool:
        """Whether a node is a mean over the tokens."""
        if node.target is not torch.ops.aten.mean.dim:
            return False
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        dims = {d % operand.meta["val"].dim() for d in node.args[1]}  # type: ignore[union-attr]
        return bool(dims & set(self.token_axes(operand)))

    def pooling(self, node: fx.Node) -> tuple[int, int, bool]:
        """Of a node that pools: its token axis, prefix tokens cut off before, whether the axis stays."""
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        ((axis, offset),) = self.token_axes(operand).items()
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        return axis, -offset, keep
