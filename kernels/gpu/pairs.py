"""Unit vectors, and their products by tiles of pairs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from thresher.kernels.gpu.shapes import blocks, power

EPSILON = 1e-12  # a zero vector gets similarity 0 to everything
ELEMENTS = 4096  # of a block of unit vectors
DEPTH = 64  # channels that are multiplied at once
MANY = 256  # from so many rows on, larger blocks of them are not mostly empty


def unit_vectors(metric: Tensor, first: int) -> Tensor:
    """Means over the heads as unit vectors: ``[B, H, N, d]`` to ``[B, N - first, d]`` float32."""
    batch, heads, tokens, depth = metric.shape
    count = tokens - first
    unit = metric.new_empty(batch, count, depth, dtype=float32)
    width = power(depth, 16, 1 << 16)
    rows = max(1, ELEMENTS // width)
    _unit_vectors[(batch, blocks(count, rows))](
        metric, unit, *metric.stride(), heads, first, count, depth, EPSILON, rows, width
    )
    return unit


def height_of(rows: int) -> int:
    """Rows of a tile of pairs, of so many."""
    return 64 if rows >= MANY else 16


def depth_of(width: int) -> int:
    """Channels that :func:`products` takes at once, of so many."""
    return power(width, 16, DEPTH)


@triton.jit(do_not_specialize=["heads", "first", "count"])
def _unit_vectors(
    metric, unit, of_item, of_head, of_token, of_channel, heads, first, count, depth,
    EPSILON: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    mask = (row < count)[:, None] & (channel < depth)[None, :]
    at = metric + item * of_item + (first + row)[:, None] * of_token + channel[None, :] * of_channel
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for head in range(0, heads):
        total += tl.load(at + head * of_head, mask=mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(total, tl.zeros([ROWS, WIDTH], tl.float32) + heads)
    length = tl.sqrt_rn(tl.sum(mean * mean, 1))
    length = tl.where(length < EPSILON, EPSILON, length)
    to = unit + (item * count + row)[:, None] * depth + channel[None, :]
    tl.store(to, tl.div_rn(mean, length[:, None] + tl.zeros([ROWS, WIDTH], tl.float32)), mask=mask)


@triton.jit
def products(
    unit, mine, inside, other, there, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Cosines of the rows ``mine`` with the rows ``other``, int64 both, where they are ``inside`` and ``there``."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        wanted = channel < depth
        left = tl.load(
            unit + mine[:, None] * depth + channel[None, :],
            mask=inside[:, None] & wanted[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            unit + other[None, :] * depth + channel[:, None],
            mask=there[None, :] & wanted[:, None], other=0.0,
        )  # fmt: skip
        # Exact products: with TensorFloat-32 ties and near ties would be decided otherwise.
        total = tl.dot(left, right, total, input_precision="ieee")
    return total
