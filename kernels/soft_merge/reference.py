"""Definition of ``soft_merge``: every token that leaves is a weighted mean of all that came.

The combination of PatchMerger (Renggli et al., 2022) and of SiT's token slimming (Zong et al., ECCV
2022), for given weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_merge(
    x: Tensor, values: Tensor, logits: Tensor, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Behind the prefix, M means ``y_j = sum_i w_ij values_i`` with ``w_j = softmax_i(logits_ij)``.

    The softmax is taken in float32 or wider.  A mean stands for the token of largest weight in it, and
    a token lives where its weight is largest; ties go to the lower index.

    Args:
        x: ``[B, N, C]`` tokens, of which the prefix is read.
        values: ``[B, N, C]`` what is averaged; the prefix's entries are not read.
        logits: ``[B, N, M]`` float32; those of padding are far below all others.
        protected: length P of the prefix that passes unchanged.

    Returns:
        Tokens ``[B, P + M, C]``; ``slot [B, N]`` int64, where each incoming token lives now;
        ``kept [B, P + M]`` int64, the incoming position that each outgoing token stands for.
    """
    batch = x.shape[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    weight = logits[:, protected:].to(wide).softmax(1)
    means = weight.transpose(1, 2) @ values[:, protected:].to(wide)
    prefix = torch.arange(protected, device=x.device).expand(batch, -1)
    slot = torch.cat([prefix, protected + _first_largest(weight.detach(), 2)], dim=1)
    kept = torch.cat([prefix, protected + _first_largest(weight.detach(), 1)], dim=1)
    return torch.cat([x[:, :protected], means.to(x.dtype)], dim=1), slot, kept


def _first_largest(weight: Tensor, axis: int) -> Tensor:
    """The first of equal maxima, which argmax does not promise."""
    largest = weight == weight.amax(axis, keepdim=True)
    return largest.long().cumsum(axis).eq(0).sum(axis)


def fake(
    x: Tensor, values: Tensor, logits: Tensor, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result."""
    batch, tokens, width = x.shape
    left = protected + logits.shape[2]
    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    return x.new_empty(batch, left, width), slot, slot.new_empty(batch, left)
