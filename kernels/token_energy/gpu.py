"""``token_energy`` in Triton; see reference.py for what it computes.

Unit keys, then tiles of pairs of which only sums are kept.  Where tokens are many, what they feel is split among
programs, and a last launch adds the parts: by the number of tokens alone, so that no batch changes a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.active import add_up
from thresher.kernels.gpu.pairs import depth_of, height_of, products, unit_vectors
from thresher.kernels.gpu.shapes import blocks, demand
from thresher.kernels.token_energy.reference import check

COLUMNS, SPAN = 64, 512  # tokens that meet a block of rows at once, and in one program
SIZES = 512  # that are counted at once


def token_energy(metric: Tensor, size: Tensor, margin: float, protected: int) -> Tensor:
    """The definition's result, for float16, bfloat16 and float32.

    Raises:
        ValueError: the prefix or size does not fit the metric.
    """
    check(metric, protected)
    batch, _, tokens, depth = metric.shape
    demand("token_energy", "size", size, (batch, tokens))
    unit = unit_vectors(metric, 0)
    height, splits = height_of(tokens), max(1, blocks(tokens - protected, SPAN))
    sums = unit.new_empty(splits, batch, tokens)
    _energy[(batch, blocks(tokens, height), splits)](
        unit, size, sums, *size.stride(), margin, protected, tokens, depth,
        height, COLUMNS, SPAN, SIZES, depth_of(depth),
    )  # fmt: skip
    return add_up(sums, torch.float32) if splits > 1 else sums[0]


@triton.jit(do_not_specialize=["size_item", "margin", "protected", "tokens"])
def _energy(
    unit, size, sums, size_item, size_token, margin, protected, tokens, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, SIZES: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """What a block of tokens feels of a part of all that are no padding, divided by the number of all."""
    item = tl.program_id(0).to(tl.int64)
    unit += item * tokens * depth
    size += item * size_item
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < tokens
    begin = protected + tl.program_id(2) * SPAN
    felt = tl.zeros([ROWS], tl.float32)
    for start in range(begin, tl.minimum(begin + SPAN, tokens), COLUMNS):
        other = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        there = other < tokens
        cosine = products(unit, row, inside, other, there, depth, ROWS, COLUMNS, DEPTH)
        value = tl.where(cosine >= margin, cosine, tl.exp(cosine - margin) - 1.0)
        real = tl.load(size + other * size_token, mask=there, other=0.0) > 0
        felt += tl.sum(tl.where(real[None, :], value, 0.0), 1)
    count = tl.zeros([SIZES], tl.float32)
    for start in range(protected, tokens, SIZES):
        other = (start + tl.arange(0, SIZES)).to(tl.int64)
        held = tl.load(size + other * size_token, mask=other < tokens, other=0.0)
        count += (held > 0).to(tl.float32)
    total = tl.maximum(tl.sum(count, 0), 1.0)
    part = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + item) * tokens
    tl.store(sums + part + row, tl.div_rn(felt, total + tl.zeros([ROWS], tl.float32)), mask=inside)
