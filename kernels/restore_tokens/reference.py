"""Definition of ``thresher::restore_tokens``."""

from __future__ import annotations

import torch

from thresher.kernels.gather_tokens.reference import gather_tokens


def restore_tokens(x: torch.Tensor, slot: torch.Tensor, aside: torch.Tensor) -> torch.Tensor:
    """``x [B, K, C]``, int64 ``slot [B, N]``, ``aside [B, N, C]`` to ``[B, N, C]``.

    Token i reads ``x[slot[i]]``, or ``aside[i]`` where ``slot[i]`` is negative (dropped).
    """
    return torch.where((slot >= 0).unsqueeze(-1), gather_tokens(x, slot.clamp(min=0)), aside)


def shape(x: torch.Tensor, slot: torch.Tensor, aside: torch.Tensor) -> torch.Tensor:
    """Shapes and dtypes of the result."""
    return torch.empty_like(aside)
