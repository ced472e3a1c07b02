"""Token sizes: how many input tokens each token stands for, and where that number matters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.surgery import Rewriter

MASKED = -1e4  # additive masks at or below this hide a key; the same in float16


def initial_sizes(rewriter: Rewriter, x: fx.Node) -> fx.Node:
    """``[B, N]`` float32 ones."""
    return rewriter.inline(
        lambda x: torch.ones((x.shape[0], x.shape[1]), dtype=torch.float32, device=x.device), x
    )


def visible(mask: torch.Tensor) -> torch.Tensor:
    """``[B, N]`` float32 from an attention mask ``[B, 1, 1|N, N]``: 0 for keys that no query may see."""
    seen = mask if mask.dtype == torch.bool else mask > MASKED
    return seen[:, 0].float().amax(dim=-2)


def validity(rewriter: Rewriter, mask: fx.Node) -> fx.Node:
    """:func:`visible` as nodes of the graph."""
    return rewriter.inline(visible, mask)


def add_log_size(rewriter: Rewriter, mask: fx.Node | None, size: fx.Node, like: fx.Node) -> fx.Node:
    """Attention bias ``log s_j`` for every column j, added to a mask if there is one.

    Proportional attention (ToMe, section 3): softmax(q k / sqrt(d) + log s).  Sizes below one
    (padding, 0) count as one here; their mask hides them.
    """
    return _add_bias(rewriter, mask, size, like, lambda size: size.clamp(min=1.0).log())


def hide_empty(rewriter: Rewriter, mask: fx.Node | None, size: fx.Node, like: fx.Node) -> fx.Node:
    """Attention bias that hides the columns of tokens of size 0, added to a mask if there is one."""
    return _add_bias(rewriter, mask, size, like, lambda size: torch.where(size > 0, 0.0, MASKED))


def _add_bias(
    rewriter: Rewriter,
    mask: fx.Node | None,
    size: fx.Node,
    like: fx.Node,
    of_column: Callable[[torch.Tensor], torch.Tensor],
) -> fx.Node:
    """``like``: keys ``[B, H, N, d]``, or ``[B H, N, d]`` where heads are folded into the batch."""
    keys = like.meta["val"]
    dtype, folded = keys.dtype, keys.dim() == 3
    heads = hint_of(keys.shape[0]) // hint_of(size.meta["val"].shape[0])

    def bias(size: torch.Tensor) -> torch.Tensor:
        column = of_column(size)[:, None, None, :].to(dtype)
        return column.expand(-1, heads, -1, -1).flatten(0, 1) if folded else column

    def with_mask(size: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, MASKED).to(dtype)
        return mask + bias(size)

    return rewriter.inline(bias, size) if mask is None else rewriter.inline(with_mask, size, mask)


def size_weighted(
    x: torch.Tensor, size: torch.Tensor, axis: int, prefix: int, keepdim: bool
) -> torch.Tensor:
    """Mean over the token axis, each token counted as often as its size; ``x`` lacks ``prefix`` tokens."""
    weight = size[:, prefix:] if prefix else size
    shape = [1] * x.dim()
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    weight = weight / weight.sum(dim=1, keepdim=True)
    return (x * weight.reshape(shape).to(x.dtype)).sum(dim=axis, keepdim=keepdim)


def size_weighted_shares(
    shares: torch.Tensor, size: torch.Tensor, axis: int, prefix: int
) -> torch.Tensor:
    """A softmax over the token axis, each token counted as often as its size; sums to one again."""
    weight = size[:, prefix:] if prefix else size
    shape = [1] * shares.dim()
    shape[0], shape[axis] = shares.shape[0], shares.shape[axis]
    weighed = shares * weight.reshape(shape).to(shares.dtype)
    return weighed / weighed.sum(dim=axis, keepdim=True)


def weighted_mean(
    rewriter: Rewriter, x: fx.Node, size: fx.Node, axis: int, prefix: int, keepdim: bool
) -> fx.Node:
    """:func:`size_weighted` as nodes of the graph."""
    return rewriter.inline(lambda x, size: size_weighted(x, size, axis, prefix, keepdim), x, size)
