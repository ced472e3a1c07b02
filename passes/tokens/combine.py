"""Combinations other than the mean: what a merged token becomes."""

from __future__ import annotations

import torch
from torch import Tensor


def mlerp(x: Tensor, size: Tensor, y: Tensor, total: Tensor, slot: Tensor, kept: Tensor) -> Tensor:
    """Means with the length of the longest token in them, as a mean is shorter than what it averages.

    ToFu's norm-preserving merge (Kim et al., "Token Fusion: Bridging the Gap between Token Pruning
    and Token Merging", WACV 2024): ``(mean / |mean|) max_k |x_k|`` over the tokens that merge.  Padding
    counts for nothing, and a token that nothing joins stays bit for bit.

    Args:
        x: ``[B, N, C]`` tokens before merging.
        size: ``[B, N]`` their sizes; 0 is padding.
        y: ``[B, K, C]`` size-weighted means.
        total: ``[B, K]`` their sizes.
        slot: ``[B, N]`` int64, the mean that each token went into.
        kept: ``[B, K]`` int64, the token that each mean stands for.

    Returns:
        ``[B, K, C]``, dtype of y; computed in float32 or wider.
    """
    places = torch.arange(y.shape[1], device=y.device)
    length = torch.where(size > 0, _length(x), 0.0)
    longest = torch.where(slot[:, None] == places[:, None], length[:, None], 0.0).amax(-1)
    own = _length(y)
    grows = (total != size.gather(1, kept)) & (own > 0)
    factor = torch.where(grows, longest / torch.where(grows, own, 1.0), 1.0)
    return (y * factor[..., None]).to(y.dtype)


def _length(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1).sqrt()
