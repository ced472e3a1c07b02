"""Positions in a ranking by counting, without a sort: each element counts those that come before it.

Comparisons grow with the square of the count, but they are independent: every one of 4,096 tokens
costs a program of 32 a few microseconds.  Ties go to the lower index, NaN comes last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.shapes import blocks

BLOCK, OTHERS = 32, 128  # elements of a program, and those it compares them with at once


def rank(score: Tensor, size: Tensor | None, first: int) -> Tensor:
    """Positions of ``score[:, first:]`` by falling score.

    Args:
        score: ``[B, N]``.
        size: ``[B, N]``; a size of 0 counts as the lowest finite score.
        first: entries before it are not ranked.

    Returns:
        ``[B, N - first]`` int32, a permutation of each row.
    """
    batch, count = score.shape[0], score.shape[1] - first
    position = score.new_empty(batch, count, dtype=torch.int32)
    given = score if size is None else size
    lowest = torch.finfo(score.dtype).min
    _rank[(batch, blocks(count, BLOCK))](
        score, given, position, *score.stride(), *given.stride(), first, count,
        lowest, size is not None, BLOCK, OTHERS,
    )  # fmt: skip
    return position


def select(
    position: Tensor, slot: Tensor, kept: Tensor, joining: Tensor, stay: int, join: int
) -> None:
    """Write where tokens go of which the ``stay`` first in a ranking stay, in index order.

    Args:
        position: ``[B, N - protected]`` of :func:`rank`.
        slot: ``[B, N]`` int64, written: the outgoing row of each token that stays, else -1.
        kept: ``[B, protected + stay]`` int64 or more columns, written: tokens of the outgoing rows.
        joining: ``[B, join]`` int64, written: the next ``join`` tokens by rank.
        stay: how many stay behind the prefix.
        join: how many of those that come after them are wanted.
    """
    batch, tokens = slot.shape
    _select[(batch, blocks(tokens, BLOCK))](
        position, slot, kept, joining, tokens, tokens - position.shape[1], stay, join,
        kept.stride(0), joining.stride(0), BLOCK, OTHERS,
    )  # fmt: skip


@triton.jit
def _keys(score, size, index, mask, score_stride, size_stride, lowest, PADDING: tl.constexpr):
    key = tl.load(score + index * score_stride, mask=mask, other=0.0).to(tl.float32)
    key = tl.where(key == key, key, float("-inf"))
    if PADDING:
        held = tl.load(size + index * size_stride, mask=mask, other=0.0)
        key = tl.where(held == 0, lowest, key)
    return key


@triton.jit(do_not_specialize=["first", "count", "lowest"])
def _rank(
    score, size, position, score_item, score_token, size_item, size_token, first, count,
    lowest, PADDING: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    score += item * score_item + first * score_token
    size += item * size_item + first * size_token
    mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = _keys(score, size, mine, mine < count, score_token, size_token, lowest, PADDING)
    before = tl.zeros([BLOCK, OTHERS], tl.int32)  # summed at the end: lanes meet once
    for start in range(0, count, OTHERS):
        other = start + tl.arange(0, OTHERS)
        there = other < count
        against = _keys(score, size, other, there, score_token, size_token, lowest, PADDING)
        tie = (against[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
        earlier = ((against[None, :] > key[:, None]) | tie) & there[None, :]
        before += earlier.to(tl.int32)
    tl.store(position + item * count + mine, tl.sum(before, 1), mask=mine < count)


@triton.jit(do_not_specialize=["tokens", "protected", "stay", "join", "kept_item", "joining_item"])
def _select(
    position, slot, kept, joining, tokens, protected, stay, join, kept_item, joining_item,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count, mine = tokens - protected, token - protected
    position += item * count
    behind = (mine >= 0) & (token < tokens)
    place = tl.load(position + mine, mask=behind, other=stay + join)
    before = tl.zeros([BLOCK, OTHERS], tl.int32)
    for start in range(0, count, OTHERS):
        other = start + tl.arange(0, OTHERS)
        stays = tl.load(position + other, mask=other < count, other=stay) < stay
        before += (stays[None, :] & (other[None, :] < mine[:, None])).to(tl.int32)
    prefix, stays = token < protected, place < stay
    row = tl.where(prefix, token, tl.where(stays, protected + tl.sum(before, 1), -1))
    tl.store(slot + item * tokens + token, row, mask=token < tokens)
    tl.store(kept + item * kept_item + row, token, mask=(token < tokens) & (row >= 0))
    joins = behind & (place >= stay) & (place < stay + join)
    tl.store(joining + item * joining_item + place - stay, token, mask=joins)
