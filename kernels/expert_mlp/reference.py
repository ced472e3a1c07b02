"""Definition of ``expert_mlp``: the dynamic-k layer of Szatkowski et al., "Exploiting Activation Sparsity with
Dense to Dynamic-k Mixture-of-Experts Conversion", NeurIPS 2024."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.activations import ACTIVATIONS
from thresher.kernels.adaptive_mlp.reference import add_where


def expert_mlp(
    x: Tensor, run: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str
) -> Tensor:
    """``y[b, t] = sum over e with run[b, t, e] of act(x[b, t] w1[e] + b1[e]) w2[e]``.

    Args:
        x: ``[B, N, D]`` tokens.
        run: ``[B, N, E]`` bool, experts that each token runs; any set, none among them.
        w1: ``[E, D, H]``, dtype of x.
        b1: ``[E, H]``, dtype of x.
        w2: ``[E, H, D]``, dtype of x.
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.

    Returns:
        ``[B, N, D]``, dtype of x; an output bias is the caller's.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown activation.
    """
    check(x, run, w1, b1, w2, activation)
    act, y = ACTIVATIONS[activation], torch.zeros_like(x)
    for e in range(w1.shape[0]):
        y = add_where(y, run[..., e], act(x @ w1[e] + b1[e]) @ w2[e])
    return y


def check(x: Tensor, run: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str) -> None:
    """Refuse what does not fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_mlp: no activation {activation!r}, only {', '.join(ACTIVATIONS)}")
    experts, width, hidden = w1.shape
    fits = b1.shape == (experts, hidden) and w2.shape == (experts, hidden, width)
    chosen = run.dim() == 3 and run.shape[2] == experts and run.dtype == torch.bool
    if x.dim() != 3 or x.shape[2] != width or not fits or not chosen:
        shapes = ", ".join(str(list(given.shape)) for given in (x, run, w1, b1, w2))
        raise ValueError(
            "expert_mlp wants x [B, N, D], run [B, N, E] of booleans, w1 [E, D, H], b1 [E, H] and"
            f" w2 [E, H, D], not {shapes} with {run.dtype}"
        )


def fake(x: Tensor, run: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str) -> Tensor:
    """Shape and dtype of the result."""
    check(x, run, w1, b1, w2, activation)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
