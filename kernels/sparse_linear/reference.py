"""Definition of ``sparse_linear``: ``y = (x where |x| > threshold) W`` for few tokens, dense for many."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_linear(x: Tensor, weight: Tensor, threshold: Tensor, most_tokens: int) -> Tensor:
    """Multiply, leaving out inputs whose size is at most their threshold.

    Args:
        x: ``[..., I]``; the product of the leading sizes is the number of tokens.
        weight: ``[I, O]``.
        threshold: ``[I]`` float32; NaN in x is always kept.
        most_tokens: with more tokens than these nothing is left out.

    Returns:
        ``[..., O]``, dtype of x.
    """
    tokens = x.numel() // max(1, x.shape[-1])
    if tokens <= most_tokens:
        x = torch.where(x.abs() <= threshold.to(x.dtype), torch.zeros_like(x), x)
    return x @ weight


def fake(x: Tensor, weight: Tensor, threshold: Tensor, most_tokens: int) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(*x.shape[:-1], weight.shape[1])
