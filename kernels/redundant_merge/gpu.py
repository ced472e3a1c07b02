"""``redundant_merge`` in Triton; see reference.py for what it computes.

Five launches: order of scores, unit keys, nearest targets, places, outgoing rows.
"""

from __future__ import annotations

from torch import Tensor

from thresher.kernels.gpu.nearest import Listed, match_pairs
from thresher.kernels.gpu.pairs import unit_vectors
from thresher.kernels.gpu.ranking import ordered, settle
from thresher.kernels.gpu.rows import merge_rows
from thresher.kernels.gpu.shapes import demand_scored
from thresher.kernels.matching import PADDING, check_half


def redundant_merge(
    x: Tensor, size: Tensor, metric: Tensor, score: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition's results, for float16, bfloat16 and float32.

    Raises:
        ValueError: ``keep`` cannot be reached, or the prefix or a shape does not fit x.
    """
    tokens, merging = x.shape[1], x.shape[1] - keep
    check_half("redundant_merge", tokens, keep, protected)
    demand_scored("redundant_merge", (x, size, metric, score), protected)
    order = ordered(score, size, protected, PADDING)[:, : 2 * merging]
    sides = Listed(order[:, ::2], order[:, 1::2])
    _, target = match_pairs(unit_vectors(metric, protected), size, sides)
    slot, kept, joining, into = settle(sides.sources, target, None, tokens, merging)
    y, out_size = merge_rows(x, size, kept, joining, into, protected)
    return y, out_size, slot, kept
