"""Definition of ``adaptive_mlp``: the module of Wójcik et al., "Adaptive Computation Modules", AAAI 2025."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.activations import ACTIVATIONS
from thresher.kernels.learners import add_where, demand, fake_of


def adaptive_mlp(
    x: Tensor, k: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> Tensor:
    """``y[b, t] = b2 + sum over n < k[b, t] of act(x[b, t] w1[n] + b1[n]) w2[n]``.

    Args:
        x: ``[B, N, D]`` tokens.
        k: ``[B, N]`` int64, learners that each token runs; below 0 counts as 0 and above L as L.
        w1: ``[L, D, H]``, dtype of x.
        b1: ``[L, H]``, dtype of x.
        w2: ``[L, H, D]``, dtype of x.
        b2: ``[D]``, dtype of x; all that a token without learners gets.
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.

    Returns:
        ``[B, N, D]``, dtype of x.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation.
    """
    check(x, k, w1, b1, w2, b2, activation)
    act, y = ACTIVATIONS[activation], torch.zeros_like(x) + b2
    for n in range(w1.shape[0]):
        y = add_where(y, k > n, act(x @ w1[n] + b1[n]) @ w2[n])
    return y


def check(
    x: Tensor, k: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> None:
    """Refuse what does not fit together."""
    demand("adaptive_mlp", "k [B, N]", k.dim() == 2, (x, k, w1, b1, w2, b2), activation)


fake = fake_of(check)
