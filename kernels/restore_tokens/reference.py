"""Definition of ``restore_tokens``: undo a reduction for heads that need every place."""

from __future__ import annotations

import torch
from torch import Tensor


def restore_tokens(x: Tensor, slot: Tensor, aside: Tensor) -> Tensor:
    """``out[b, i] = x[b, slot[b, i]]``, or ``aside[b, i]`` where the slot is negative (dropped).

    Args:
        x: ``[B, K, C]`` tokens that are left.
        slot: ``[B, N]`` int64 below K.
        aside: ``[B, N, C]`` what dropped tokens last were; dtype of x.

    Returns:
        ``[B, N, C]``.
    """
    rows = slot.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
    return torch.where((slot < 0)[..., None], aside, x.gather(1, rows))


def fake(x: Tensor, slot: Tensor, aside: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(aside, memory_format=torch.contiguous_format)
