"""``split_merge`` in Triton; see reference.py for what it computes.

Six launches: order of scores, unit keys, nearest targets, order of similarities, places, outgoing rows.
"""

from __future__ import annotations

from torch import Tensor

from thresher.kernels.gpu.nearest import Listed, match_pairs
from thresher.kernels.gpu.pairs import unit_vectors
from thresher.kernels.gpu.ranking import ordered, settle
from thresher.kernels.gpu.rows import merge_rows
from thresher.kernels.gpu.shapes import demand_scored
from thresher.kernels.matching import PADDING, check_half
from thresher.kernels.split_merge.reference import LOWEST


def split_merge(
    x: Tensor, size: Tensor, metric: Tensor, score: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition's results, for float16, bfloat16 and float32.

    Raises:
        ValueError: ``keep`` cannot be reached, or the prefix or a shape does not fit x.
    """
    tokens = x.shape[1]
    check_half("split_merge", tokens, keep, protected)
    demand_scored("split_merge", (x, size, metric, score), protected)
    order, half = ordered(score, size, protected, LOWEST, rising=True), (tokens - protected) // 2
    sides = Listed(order[:, :half], order[:, half:])
    best, target = match_pairs(unit_vectors(metric, protected), size, sides)
    alike = ordered(best, None, 0, PADDING)
    slot, kept, joining, into = settle(sides.sources, target, alike, tokens, tokens - keep)
    y, out_size = merge_rows(x, size, kept, joining, into, protected)
    return y, out_size, slot, kept
