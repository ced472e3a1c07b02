"""Definition of ``thresher::gather_tokens``."""

from __future__ import annotations

import torch


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``[B, N, *]`` and int64 ``[B, K]`` to ``[B, K, *]``: ``y[b, j] = x[b, index[b, j]]``."""
    batch = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x[batch, index]


def shape(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Shapes and dtypes of the result."""
    return x.new_empty([x.shape[0], index.shape[1], *x.shape[2:]])
