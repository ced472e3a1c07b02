"""Definition of ``adaptive_mlp``: the module of Wójcik et al., "Adaptive Computation Modules", AAAI 2025."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.activations import ACTIVATIONS


def adaptive_mlp(
    x: Tensor, k: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str
) -> Tensor:
    """``y[b, t] = sum over n < k[b, t] of act(x[b, t] w1[n] + b1[n]) w2[n]``.

    Args:
        x: ``[B, N, D]`` tokens.
        k: ``[B, N]`` int64, learners that each token runs; below 0 counts as 0 and above L as L.
        w1: ``[L, D, H]``, dtype of x.
        b1: ``[L, H]``, dtype of x.
        w2: ``[L, H, D]``, dtype of x.
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.

    Returns:
        ``[B, N, D]``, dtype of x; an output bias is the caller's.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation.
    """
    check(x, k, w1, b1, w2, activation)
    act, y = ACTIVATIONS[activation], torch.zeros_like(x)
    for n in range(w1.shape[0]):
        y = add_where(y, k > n, act(x @ w1[n] + b1[n]) @ w2[n])
    return y


def add_where(y: Tensor, runs: Tensor, one: Tensor) -> Tensor:
    """One learner's results ``[B, N, D]`` added where ``runs [B, N]``."""
    return y + torch.where(runs[..., None], one, torch.zeros_like(one))


def check(x: Tensor, k: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str) -> None:
    """Refuse what does not fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"adaptive_mlp: no activation {activation!r}, only {', '.join(ACTIVATIONS)}"
        )
    learners, width, hidden = w1.shape
    fits = b1.shape == (learners, hidden) and w2.shape == (learners, hidden, width)
    if x.dim() != 3 or k.dim() != 2 or x.shape[2] != width or not fits:
        shapes = ", ".join(str(list(given.shape)) for given in (x, k, w1, b1, w2))
        raise ValueError(
            "adaptive_mlp wants x [B, N, D], k [B, N], w1 [L, D, H], b1 [L, H] and w2 [L, H, D],"
            f" not {shapes}"
        )


def fake(x: Tensor, k: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str) -> Tensor:
    """Shape and dtype of the result."""
    check(x, k, w1, b1, w2, activation)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
