"""``select_diverse`` in Triton; see reference.py for what it computes.

Four launches: unit rows, similarities of all pairs, the choice, outgoing rows.  Only the choice is sequential:
a program for each item, whose state stays in registers, reads a row of similarities in each round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.pairs import depth_of, height_of, products, unit_vectors
from thresher.kernels.gpu.rows import copy_rows
from thresher.kernels.gpu.shapes import blocks, demand, demand_prefix, power
from thresher.kernels.select_diverse.reference import CHOSEN, PADDING, check

COLUMNS = 64  # of a tile of pairs
MOST, OF_WARP = 1 << 20, 256  # tokens that one program can hold, and that are worth a warp


def select_diverse(
    x: Tensor, size: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition's results, for float16, bfloat16 and float32.

    Raises:
        ValueError: ``keep`` cannot be reached, or the prefix or size does not fit x.
    """
    batch, tokens, width = x.shape
    check(tokens, keep, protected)
    demand_prefix("select_diverse", protected, tokens)
    demand("select_diverse", "size", size, (batch, tokens))
    pool = tokens - protected
    unit = unit_vectors(x[:, None], protected)
    height = height_of(pool)
    across, down = blocks(pool, COLUMNS), blocks(pool, height)
    closeness = unit.new_empty(batch, pool, pool)
    tops = unit.new_empty(batch, across + down, pool)
    _closeness[(batch, down, across)](
        unit, size, closeness, tops, *size.stride(), protected, pool, width,
        PADDING, CHOSEN, height, COLUMNS, depth_of(width),
    )  # fmt: skip
    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    kept, lanes = slot.new_empty(batch, keep), power(tokens, 16, MOST)
    _choose[(batch,)](
        closeness, tops, size, slot, kept, *size.stride(), protected, pool, across + down, keep,
        PADDING, CHOSEN, lanes, num_warps=power(lanes // OF_WARP, 1, 16),
    )  # fmt: skip
    y = x.new_empty(batch, keep, width)
    copy_rows(x, kept, y)
    return y, slot, kept


@triton.jit(do_not_specialize=["size_item", "protected", "pool"])
def _closeness(
    unit, size, closeness, tops, size_item, size_token, protected, pool, width,
    PADDING: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of what the others are no nearer to once a row is picked, and each token's nearest other in it.

    A product may round (i, j) and (j, i) apart, and tokens that are each other's nearest have to tie:
    a token's nearest is looked for along its row and along its column.
    """
    item, tile = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside, there = row < pool, column < pool
    alike = products(
        unit + item * pool * width, row, inside, column, there, width, ROWS, COLUMNS, DEPTH
    )
    alike = tl.where(alike == alike, alike, -PADDING)  # NaN is far from everything
    held = size + item * size_item + protected * size_token
    real = (tl.load(held + column * size_token, mask=there, other=0.0) != 0)[None, :]
    real_row = (tl.load(held + row * size_token, mask=inside, other=0.0) != 0)[:, None]
    itself, across = row[:, None] == column[None, :], tl.num_programs(2)
    top = tops + item * (across + tl.num_programs(1)) * pool
    nearest = tl.max(tl.where(real & ~itself, alike, -PADDING), 1)
    tl.store(top + tile * pool + row, nearest, mask=inside)
    nearest = tl.max(tl.where(real_row & ~itself, alike, -PADDING), 0)
    tl.store(top + (across + tl.program_id(1)) * pool + column, nearest, mask=there)
    tl.store(
        closeness + (item * pool + row)[:, None] * pool + column[None, :],
        tl.where(itself, CHOSEN, tl.where(real, alike, PADDING)),
        mask=inside[:, None] & there[None, :],
    )


@triton.jit(do_not_specialize=["size_item", "protected", "pool", "tiles", "keep"])
def _choose(
    closeness, tops, size, slot, kept, size_item, size_token, protected, pool, tiles, keep,
    PADDING: tl.constexpr, CHOSEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """All picks of an item, by the tokens' nearness to what was picked before; the prefix is nowhere."""
    item = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, LANES)
    here, mine = token < protected + pool, token - protected
    behind = here & (mine >= 0)
    near = tl.where(behind, -PADDING, float("inf"))
    for tile in range(0, tiles):
        found = tl.load(tops + (item * tiles + tile) * pool + mine, mask=behind, other=0.0)
        near = tl.maximum(near, found)
    held = tl.load(size + item * size_item + token * size_token, mask=behind, other=1.0)
    near = tl.where(held == 0, PADDING, near)
    reached = tl.where(behind, -PADDING, float("inf"))
    for _ in range(protected, keep):
        pick = tl.argmin(near, 0)  # the first of equal ones
        row = closeness + (item * pool + pick - protected) * pool
        reached = tl.maximum(reached, tl.load(row + mine, mask=behind, other=0.0))
        near = reached
    stays = here & ((mine < 0) | (reached == CHOSEN))
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(slot + item * (protected + pool) + token, tl.where(stays, place, -1), mask=here)
    tl.store(kept + item * keep + place, token, mask=stays)
