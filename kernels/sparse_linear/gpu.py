"""``sparse_linear`` in Triton; see reference.py for what it computes."""

from __future__ import annotations

from torch import Tensor

from thresher.kernels.gpu.active import MOST_TOKENS, sum_of_rows
from thresher.kernels.sparse_linear import reference


def sparse_linear(
    x: Tensor, weight: Tensor, threshold: Tensor, most_tokens: int, compact: bool = False
) -> Tensor:
    """The definition's result, for float16, bfloat16 and float32; more than 8 tokens run the definition.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    reference.check(x, weight, threshold)
    if not reference.few_tokens(x, min(most_tokens, MOST_TOKENS)):
        return reference.sparse_linear(x, weight, threshold, most_tokens)
    y = sum_of_rows(x.reshape(-1, x.shape[-1]), weight, threshold, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[1])
