"""Definition of ``sparse_linear``: input sparsity by thresholds (TEAL, Liu et al., ICLR 2025, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_linear(
    x: Tensor, weight: Tensor, threshold: Tensor, most_tokens: int, compact: bool = False
) -> Tensor:
    """``y = (x * (|x| > threshold)) @ weight`` for few tokens, ``x @ weight`` for more.

    A threshold per channel covers TEAL (all equal), WINA (t over the norm of the channel's weights) and
    CETT.  Exact zeros are dropped from threshold 0 on; a negative threshold keeps everything.  NaN is
    never small: it is kept.

    Args:
        x: ``[..., I]``; the product of the leading axes is the number of tokens.
        weight: ``[I, O]``, finite; dtype of x, or bfloat16 beside float32 tokens, to be read in half the time.
        threshold: ``[I]`` float32; ``|x|`` is compared as float32.
        most_tokens: with more tokens than that nothing is dropped: prefill stays dense.
        compact: in ONNX, the body that copies the weights of the active channels instead of masking x.
            It pays where no kernel is installed, above three quarters of sparsity; the values are
            the same.  Only ONNX Runtime takes it; with bfloat16 weights it says nothing.

    Returns:
        ``[..., O]``, dtype of x.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check(x, weight, threshold)
    if few_tokens(x, most_tokens):
        x = x.masked_fill(small(x, threshold), 0)
    return x @ weight.to(x.dtype)


def few_tokens(x: Tensor, most_tokens: int) -> bool:
    """Whether thresholds hold for as many tokens as there are in ``x``, ``[..., C]``."""
    return x.shape[:-1].numel() <= most_tokens


def small(x: Tensor, threshold: Tensor) -> Tensor:
    """Where ``|x| <= threshold``, which NaN is not."""
    return x.detach().abs().float() <= threshold


def holds_weights_of(dtype: torch.dtype, tokens: torch.dtype) -> bool:
    """Whether weights of a dtype go with tokens: of the same one, or bfloat16 beside float32."""
    return dtype == tokens or (dtype == torch.bfloat16 and tokens == torch.float32)


def check(x: Tensor, weight: Tensor, threshold: Tensor) -> None:
    """Refuse shapes and dtypes that do not fit."""
    if x.dim() < 1 or weight.dim() != 2 or threshold.dim() != 1:
        raise ValueError(
            f"sparse_linear: x has rank {x.dim()} (1 or more), weight {weight.dim()} (2) and"
            f" threshold {threshold.dim()} (1)"
        )
    width, inputs, limits = x.shape[-1], weight.shape[0], threshold.shape[0]
    if all(isinstance(n, int) for n in (width, inputs, limits)) and not width == inputs == limits:
        raise ValueError(
            f"sparse_linear: x has {width} channels, weight {inputs} and threshold {limits}"
        )
    if threshold.dtype != torch.float32 or not holds_weights_of(weight.dtype, x.dtype):
        raise ValueError(
            f"sparse_linear: threshold is {threshold.dtype} (float32) and weight {weight.dtype}"
            f" ({x.dtype} as x, or bfloat16 beside float32)"
        )


def fake(
    x: Tensor, weight: Tensor, threshold: Tensor, most_tokens: int, compact: bool = False
) -> Tensor:
    """Shape and dtype of the result."""
    check(x, weight, threshold)
    return x.new_empty(*x.shape[:-1], weight.shape[1])
