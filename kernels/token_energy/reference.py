"""Definition of ``token_energy``: PiToMe's energy (Tran et al., NeurIPS 2024, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12  # a zero key has cosine 0 to everything


def token_energy(metric: Tensor, size: Tensor, margin: float, protected: int) -> Tensor:
    """``E_i = mean_j f(cos(k_i, k_j))``, high where a token is like many others.

    ``f(x) = x`` from the margin on and ``exp(x - margin) - 1`` below; ``j`` runs over the tokens behind the
    prefix that are no padding, ``i`` itself among them, and the energy is 0 where there are none.  Keys are
    the metric's mean over the heads, in float32 or wider.  f jumps at the margin, so that a cosine
    within a rounding error of it may count for either side.

    Args:
        metric: ``[B, H, N, d]``.
        size: ``[B, N]`` float32; 0 is padding.
        margin: cosine from which tokens are alike.
        protected: length of the prefix, which has energies too, but adds to none.

    Returns:
        ``[B, N]``, float32 or wider.

    Raises:
        ValueError: there are fewer tokens than ``protected``.
    """
    check(metric, protected)
    mean = metric.to(torch.promote_types(metric.dtype, torch.float32)).mean(1)
    unit = mean / mean.square().sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
    cosine = unit @ unit[:, protected:].transpose(1, 2)
    felt = torch.where(cosine >= margin, cosine, (cosine - margin).exp() - 1)
    real = (size[:, protected:] > 0).to(felt.dtype)
    total = real.sum(1, keepdim=True).clamp(min=1.0)
    return (felt * real[:, None]).sum(-1) / total


def check(metric: Tensor, protected: int) -> None:
    """Refuse a prefix that is longer than the sequence."""
    tokens = metric.shape[2]
    if protected < 0 or (isinstance(tokens, int) and protected > tokens):
        raise ValueError(f"token_energy: a prefix of {protected} is none of {tokens} tokens")


def fake(metric: Tensor, size: Tensor, margin: float, protected: int) -> Tensor:
    """Shape and dtype of the result."""
    check(metric, protected)
    dtype = torch.promote_types(metric.dtype, torch.float32)
    return metric.new_empty(metric.shape[0], metric.shape[2], dtype=dtype)
