"""``adaptive_mlp`` in Triton; see reference.py for what it computes."""

from __future__ import annotations

from torch import Tensor

from thresher.kernels.adaptive_mlp.reference import check
from thresher.kernels.gpu.learners import Choice, run_learners
from thresher.kernels.gpu.shapes import demand


def adaptive_mlp(
    x: Tensor, k: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> Tensor:
    """The definition's result, for float16, bfloat16 and float32.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation.
    """
    check(x, k, w1, b1, w2, b2, activation)
    demand("adaptive_mlp", "k", k, x.shape[:2])
    return run_learners(x, Choice.by_count(k, len(w1)), (w1, b1), None, (w2, b2), activation)
