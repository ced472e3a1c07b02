"""``sparse_gated_ffn`` in Triton; see reference.py for what it computes."""

from __future__ import annotations

from torch import Tensor

from thresher.kernels.gpu.active import MOST_TOKENS, products_of_rows, sum_of_rows
from thresher.kernels.sparse_gated_ffn import reference
from thresher.kernels.sparse_linear.reference import few_tokens


def sparse_gated_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    activation: str,
    most_tokens: int,
) -> Tensor:
    """The definition's result, for float16, bfloat16 and float32; more than 8 tokens run the definition.

    The gate is dense and PyTorch's own product.

    Raises:
        ValueError: shapes, dtypes or the activation do not fit.
    """
    reference.check(x, gate, up, down, threshold, activation)
    if not few_tokens(x, min(most_tokens, MOST_TOKENS)):
        return reference.sparse_gated_ffn(x, gate, up, down, threshold, activation, most_tokens)
    rows = x.reshape(-1, x.shape[-1])
    h = reference.ACTIVATIONS[activation](rows @ gate.to(x.dtype))
    hidden = products_of_rows(rows, up, h, threshold)
    y = sum_of_rows(hidden, down, None, x.dtype)
    return y.view(*x.shape[:-1], down.shape[1])
