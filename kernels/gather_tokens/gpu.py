"""``gather_tokens`` in Triton; see reference.py for what it computes."""

from __future__ import annotations

import math

from torch import Tensor

from thresher.kernels.gather_tokens.reference import check
from thresher.kernels.gpu.rows import copy_rows
from thresher.kernels.gpu.shapes import demand


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The definition's result for real types other than double; positions that are not there give zeros.

    Raises:
        ValueError: wrong ranks, or another batch.
    """
    check(x, index)
    batch, rows = index.shape
    demand("gather_tokens", "x", x, (batch, *x.shape[1:]))
    width = math.prod(x.shape[2:])
    y = x.new_empty(batch, rows, width)
    copy_rows(x.reshape(batch, x.shape[1], width), index, y)
    return y.reshape(batch, rows, *x.shape[2:])
