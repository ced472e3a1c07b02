"""``restore_tokens`` in Triton; see reference.py for what it computes."""

from __future__ import annotations

from torch import Tensor

from thresher.kernels.gpu.rows import copy_rows
from thresher.kernels.gpu.shapes import demand


def restore_tokens(x: Tensor, slot: Tensor, aside: Tensor) -> Tensor:
    """The definition's result; slots that are not there give zeros.

    Raises:
        ValueError: a shape does not fit.
    """
    demand("restore_tokens", "slot", slot, aside.shape[:2])
    demand("restore_tokens", "x", x, (aside.shape[0], x.shape[1], aside.shape[2]))
    y = aside.new_empty(aside.shape)
    copy_rows(x, slot, y, aside)
    return y
