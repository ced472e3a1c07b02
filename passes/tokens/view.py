"""What a scorer or a step sees of a site while the graph is being rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.compiler.surgery import Rewriter
from thresher.passes.tokens.budget import Size


@dataclass(frozen=True)
class SiteView:
    """Tensors of one site, all at the current token count N.

    Attributes:
        x: residual stream ``[B, N, C]``.
        q, k, v: ``[B, H, N, d]`` of the block's attention, as the attention sees them.
        source: ``[B, N, C]`` what the keys' linear reads, or None.
        mask: additive or boolean mask of that attention, or None.
        size: ``[B, N]`` float32, how many input tokens each token stands for (0: padding), or None
            when every token stands for itself.
        scale: the attention's scale.
        layer: number of the block, from 0.
        protected: number of prefix tokens that never go.
        class_token: index of the class token, or None.
        keep: tokens that are to leave, fewer than N.
        weights: learned tensors of this site by name, of steps that have any.
    """

    rewriter: Rewriter
    x: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    source: fx.Node | None
    mask: fx.Node | None
    size: fx.Node | None
    scale: float
    layer: int
    protected: int
    class_token: int | None
    keep: Size
    weights: Mapping[str, fx.Node] = field(default_factory=dict)

    def emit(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Append one operator call."""
        return self.rewriter.emit(target, *args)

    def count(self, function: Callable[..., Any], *sizes: Size) -> Size:
        """A function of token counts: computed where all are numbers, else appended."""
        if all(isinstance(size, int) for size in sizes):
            return int(function(*sizes))
        return self.emit(function, *sizes)

    def inline(self, function: Callable[..., torch.Tensor], *nodes: fx.Node) -> fx.Node:
        """Append what a plain torch function of these nodes' tensors does."""
        return self.rewriter.inline(function, *nodes)
