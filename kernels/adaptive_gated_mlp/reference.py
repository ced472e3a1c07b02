"""Definition of ``adaptive_gated_mlp``: the module of ``adaptive_mlp`` for gated networks.

The weights have the names of Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.activations import ACTIVATIONS
from thresher.kernels.learners import add_where, demand, fake_of


def adaptive_gated_mlp(
    x: Tensor,
    k: Tensor,
    w1: Tensor,
    b1: Tensor,
    v: Tensor,
    c: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: str,
) -> Tensor:
    """``y[b, t] = b2 + sum over n < k[b, t] of (act(x[b, t] w1[n] + b1[n]) * (x[b, t] v[n] + c[n])) w2[n]``.

    ``v [L, D, H]`` and ``c [L, H]`` are the factor that no activation bends; all else is as in
    ``adaptive_mlp``.
    """
    check(x, k, w1, b1, v, c, w2, b2, activation)
    act, y = ACTIVATIONS[activation], torch.zeros_like(x) + b2
    for n in range(w1.shape[0]):
        y = add_where(y, k > n, (act(x @ w1[n] + b1[n]) * (x @ v[n] + c[n])) @ w2[n])
    return y


def check(
    x: Tensor,
    k: Tensor,
    w1: Tensor,
    b1: Tensor,
    v: Tensor,
    c: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: str,
) -> None:
    """Refuse what does not fit together."""
    demand("adaptive_gated_mlp", "k [B, N]", k.dim() == 2, (x, k, w1, b1, w2, b2), activation)
    if v.shape != w1.shape or c.shape != b1.shape:
        raise ValueError(
            f"adaptive_gated_mlp wants v and c as w1 {list(w1.shape)} and b1 {list(b1.shape)}, not"
            f" {list(v.shape)} and {list(c.shape)}"
        )


fake = fake_of(check)
