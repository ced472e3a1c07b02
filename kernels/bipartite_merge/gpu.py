"""``bipartite_merge`` in Triton; see reference.py for what it computes.

Five launches: unit keys, nearest targets, ranking, places, outgoing rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.bipartite_merge.reference import check
from thresher.kernels.gpu.nearest import EverySecond, match_every_second
from thresher.kernels.gpu.pairs import unit_vectors
from thresher.kernels.gpu.ranking import rank
from thresher.kernels.gpu.rows import merge_rows
from thresher.kernels.gpu.shapes import blocks, demand, demand_prefix

BLOCK, OTHERS = 32, 128  # tokens of a program, and sources that it looks at at once


def bipartite_merge(
    x: Tensor, size: Tensor, metric: Tensor, keep: int, protected: int, by_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition's results, for float16, bfloat16 and float32.

    Raises:
        ValueError: ``keep`` cannot be reached, or the prefix or a shape does not fit x.
    """
    batch, tokens, _ = x.shape
    check(tokens, keep, protected)
    demand_prefix("bipartite_merge", protected, tokens)
    demand("bipartite_merge", "size", size, (batch, tokens))
    heads, depth = metric.shape[1], metric.shape[-1]
    demand("bipartite_merge", "metric", metric, (batch, heads, tokens, depth))
    behind = tokens - protected
    sides = EverySecond(protected, (behind + 1 - protected % 2) // 2, (behind + protected % 2) // 2)
    merging = tokens - keep
    first_row = protected + sides.sources - merging
    best, row = match_every_second(unit_vectors(metric, protected), size, sides, first_row)
    position = rank(best, None, 0)

    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    kept = slot.new_empty(batch, keep)
    joining, into = slot.new_empty(batch, merging), slot.new_empty(batch, merging)
    _place[(batch, blocks(tokens, BLOCK))](
        position, row, slot, kept, joining, into, tokens, keep, protected, sides.sources,
        merging, by_index, BLOCK, OTHERS,
    )  # fmt: skip
    y, out_size = merge_rows(x, size, kept, joining, into, first_row)
    return y, out_size, slot, kept


@triton.jit(do_not_specialize=["tokens", "keep", "protected", "sources", "merging"])
def _place(
    position, target_row, slot, kept, joining, into, tokens, keep, protected, sources, merging,
    BY_INDEX: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    position += item * sources
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    even = inside & (token >= protected) & (token % 2 == 0)
    source = (token - protected) // 2
    target = (token - protected - 1 + protected % 2) // 2
    place = tl.load(position + source, mask=even, other=0)
    if BY_INDEX:
        before = tl.zeros([BLOCK], tl.int32)
        for start in range(0, sources, OTHERS):
            other = start + tl.arange(0, OTHERS)
            stays = tl.load(position + other, mask=other < sources, other=-1) >= merging
            earlier = stays[None, :] & (other[None, :] < source[:, None])
            before += tl.sum(earlier.to(tl.int32), 1)
    else:
        before = place - merging
    merges = even & (place < merging)
    row = tl.where(even, protected + before, protected + sources - merging + target)
    row = tl.where(token < protected, token, row).to(tl.int64)
    joined = tl.load(target_row + item * sources + source, mask=merges, other=0)
    row = tl.where(merges, joined, row)
    tl.store(slot + item * tokens + token, row, mask=inside)
    tl.store(kept + item * keep + row, token, mask=inside & ~merges)
    tl.store(joining + item * merging + place, token, mask=merges)
    tl.store(into + item * merging + place, joined, mask=merges)
