"""Definition of ``expert_mlp``: the dynamic-k layer of Szatkowski et al., "Exploiting Activation Sparsity with
Dense to Dynamic-k Mixture-of-Experts Conversion", NeurIPS 2024."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.activations import ACTIVATIONS
from thresher.kernels.learners import add_where, demand, fake_of


def expert_mlp(
    x: Tensor, run: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> Tensor:
    """``y[b, t] = b2 + sum over e with run[b, t, e] of act(x[b, t] w1[e] + b1[e]) w2[e]``.

    Args:
        x: ``[B, N, D]`` tokens.
        run: ``[B, N, L]`` bool, experts that each token runs; any set, none among them.
        w1: ``[L, D, H]``, dtype of x.
        b1: ``[L, H]``, dtype of x.
        w2: ``[L, H, D]``, dtype of x.
        b2: ``[D]``, dtype of x; all that a token without experts gets.
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.

    Returns:
        ``[B, N, D]``, dtype of x.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown activation.
    """
    check(x, run, w1, b1, w2, b2, activation)
    act, y = ACTIVATIONS[activation], torch.zeros_like(x) + b2
    for e in range(w1.shape[0]):
        y = add_where(y, run[..., e], act(x @ w1[e] + b1[e]) @ w2[e])
    return y


def check(
    x: Tensor, run: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> None:
    """Refuse what does not fit together."""
    fits = run.dim() == 3 and run.shape[2] == w1.shape[0] and run.dtype == torch.bool
    tensors = (x, run, w1, b1, w2, b2)
    demand("expert_mlp", "run [B, N, L] of booleans", fits, tensors, activation)


fake = fake_of(check)
