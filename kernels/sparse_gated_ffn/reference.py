"""Definition of ``sparse_gated_ffn``: neurons chosen by their gate (CATS, Lee et al., COLM 2024, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels import activations
from thresher.kernels.sparse_linear.reference import few_tokens, holds_weights_of, small

ACTIVATIONS = {name: activations.ACTIVATIONS[name] for name in ("silu", "gelu", "relu")}


def sparse_gated_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    activation: str,
    most_tokens: int,
) -> Tensor:
    """``y = (h * (x @ up.T) * (|h| > threshold)) @ down`` with ``h = activation(x @ gate)``.

    With more tokens than ``most_tokens`` no neuron is dropped.  NaN is never small: it is kept.  The
    rules for thresholds are those of ``sparse_linear``.

    Args:
        x: ``[..., I]``.
        gate: ``[I, F]``; all weights of x's dtype, or bfloat16 beside float32 tokens.
        up: ``[F, I]``, a row for each neuron, so that one that is not needed is one row not read.
        down: ``[F, O]``, finite.
        threshold: ``[F]`` float32.
        activation: ``silu``, ``gelu`` (by erf) or ``relu``.
        most_tokens: with more tokens than that nothing is dropped.

    Returns:
        ``[..., O]``, dtype of x.

    Raises:
        ValueError: shapes, dtypes or the activation do not fit.
    """
    check(x, gate, up, down, threshold, activation)
    gate, up, down = (weight.to(x.dtype) for weight in (gate, up, down))
    h = ACTIVATIONS[activation](x @ gate)
    product = h * (x @ up.T)
    if few_tokens(x, most_tokens):
        product = product.masked_fill(small(h, threshold), 0)
    return product @ down


def check(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, threshold: Tensor, activation: str
) -> None:
    """Refuse shapes, dtypes and activations that do not fit."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"sparse_gated_ffn: activation {activation} is not {', '.join(ACTIVATIONS)}"
        )
    ranks = [t.dim() for t in (gate, up, down, threshold)]
    if x.dim() < 1 or ranks != [2, 2, 2, 1]:
        raise ValueError(
            f"sparse_gated_ffn: x has rank {x.dim()} (1 or more), gate, up, down and threshold {ranks}"
            " ([2, 2, 2, 1])"
        )
    width, neurons = x.shape[-1], threshold.shape[0]
    found = [tuple(gate.shape), tuple(up.shape), down.shape[0]]
    known = all(isinstance(n, int) for n in (width, neurons))
    if known and found != [(width, neurons), (neurons, width), neurons]:
        raise ValueError(
            f"sparse_gated_ffn: gate is {found[0]}, up {found[1]} and down ({found[2]}, O) for {width}"
            f" channels and {neurons} thresholds"
        )
    alike = gate.dtype == up.dtype == down.dtype and holds_weights_of(gate.dtype, x.dtype)
    if threshold.dtype != torch.float32 or not alike:
        raise ValueError(
            f"sparse_gated_ffn: threshold is {threshold.dtype} (float32) and gate, up and down"
            f" {gate.dtype}, {up.dtype} and {down.dtype} ({x.dtype} as x, or all bfloat16 beside float32)"
        )


def fake(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    activation: str,
    most_tokens: int,
) -> Tensor:
    """Shape and dtype of the result."""
    check(x, gate, up, down, threshold, activation)
    return x.new_empty(*x.shape[:-1], down.shape[1])
