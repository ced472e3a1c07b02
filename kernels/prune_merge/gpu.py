"""``prune_merge`` in Triton; see reference.py for what it computes.

Five launches: ranking, places, unit vectors, nearest of those that stay, outgoing rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.gpu.nearest import Listed, match_listed
from thresher.kernels.gpu.pairs import unit_vectors
from thresher.kernels.gpu.ranking import rank, select
from thresher.kernels.gpu.rows import merge_rows
from thresher.kernels.gpu.shapes import demand, demand_prefix
from thresher.kernels.prune_merge.reference import check


def prune_merge(
    x: Tensor, size: Tensor, score: Tensor, pruned: int, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition's results, for float16, bfloat16 and float32.

    Raises:
        ValueError: ``pruned`` and ``keep`` cannot be reached, or the prefix or a shape does not fit x.
    """
    batch, tokens, _ = x.shape
    check(tokens, pruned, keep, protected)
    demand_prefix("prune_merge", protected, tokens)
    demand("prune_merge", "size", size, (batch, tokens))
    demand("prune_merge", "score", score, (batch, tokens))
    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    kept, joining = slot.new_empty(batch, keep), slot.new_empty(batch, pruned - keep)
    position = rank(score, size, protected)
    select(position, slot, kept, joining, keep - protected, pruned - keep)
    unit = unit_vectors(x[:, None], protected)
    cosine, into = match_listed(unit, size, Listed(joining, kept[:, protected:]), slot)
    y, out_size = merge_rows(x, size, kept, joining, into, protected, cosine)
    return y, out_size, slot, kept
