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
    position = score.new_empty(len(score), score.shape[1] - first, dtype=torch.int32)
    _launch(score, size, first, position, torch.finfo(score.dtype).min, False, False)
    return position


def ordered(
    score: Tensor, size: Tensor | None, first: int, padding: float, rising: bool = False
) -> Tensor:
    """Places of ``score[:, first:]`` in the order of the ranking; a size of 0 counts as a score of ``padding``.

    Returns:
        ``[B, N - first]`` int64, each of ``first .. N - 1`` once in a row.
    """
    order = score.new_empty(len(score), score.shape[1] - first, dtype=torch.int64)
    _launch(score, size, first, order, padding, rising, True)
    return order


def _launch(
    score: Tensor, size: Tensor | None, first: int, to: Tensor, padding: float, rising: bool,
    order: bool,
) -> None:  # fmt: skip
    batch, count = to.shape
    given = score if size is None else size
    _rank[(batch, blocks(count, BLOCK))](
        score, given, to, *score.stride(), *given.stride(), first, count, padding,
        size is not None, rising, order, BLOCK, OTHERS,
    )  # fmt: skip


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


def settle(
    sources: Tensor, targets: Tensor, chosen: Tensor | None, tokens: int, merging: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where tokens go of which some join others and the rest stays, in index order.

    Args:
        sources, targets: ``[B, S]`` int64, tokens that may merge and the token that each would join.
        chosen: ``[B, S]`` int64, numbers of sources, of which the first ones merge; None is in their order.
        tokens: number N of all.
        merging: number J of those that merge.

    Returns:
        ``slot [B, N]``, the outgoing row of each token; ``kept [B, N - J]``, the token of each row;
        ``joining [B, J]``, the tokens that merge; and ``into [B, J]``, the row that each joins; all int64.
    """
    batch, some = len(sources), sources if chosen is None else chosen
    slot = sources.new_empty(batch, tokens)
    kept = slot.new_empty(batch, tokens - merging)
    joining, into = slot.new_empty(2, batch, merging)
    _settle[(batch, blocks(tokens, BLOCK) + blocks(merging, BLOCK))](
        sources, targets, some, slot, kept, joining, into, *sources.stride(), *targets.stride(),
        *some.stride(), tokens, merging, chosen is not None, BLOCK, OTHERS,
    )  # fmt: skip
    return slot, kept, joining, into


@triton.jit
def _keys(
    score, size, index, mask, score_stride, size_stride, padding,
    SIZED: tl.constexpr, RISING: tl.constexpr,
):  # fmt: skip
    key = tl.load(score + index * score_stride, mask=mask, other=0.0).to(tl.float32)
    if SIZED:
        held = tl.load(size + index * size_stride, mask=mask, other=0.0)
        key = tl.where(held == 0, padding, key)
    if RISING:
        key = -key
    return tl.where(key == key, key, float("-inf"))


@triton.jit(do_not_specialize=["first", "count", "padding"])
def _rank(
    score, size, to, score_item, score_token, size_item, size_token, first, count, padding,
    SIZED: tl.constexpr, RISING: tl.constexpr, ORDER: tl.constexpr,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    score += item * score_item + first * score_token
    size += item * size_item + first * size_token
    mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = _keys(score, size, mine, mine < count, score_token, size_token, padding, SIZED, RISING)
    before = tl.zeros([BLOCK, OTHERS], tl.int32)  # summed at the end: lanes meet once
    for start in range(0, count, OTHERS):
        other = start + tl.arange(0, OTHERS)
        there = other < count
        against = _keys(score, size, other, there, score_token, size_token, padding, SIZED, RISING)
        tie = (against[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
        earlier = ((against[None, :] > key[:, None]) | tie) & there[None, :]
        before += earlier.to(tl.int32)
    place = tl.sum(before, 1)
    if ORDER:
        tl.store(to + item * count + place, first + mine, mask=mine < count)
    else:
        tl.store(to + item * count + mine, place, mask=mine < count)


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


@triton.jit
def _merging(sources, chosen, number, there, source_token, chosen_token, CHOSEN: tl.constexpr):
    """Numbers among the sources of those that merge, and the tokens."""
    if CHOSEN:
        number = tl.load(chosen + number * chosen_token, mask=there, other=0)
    return number, tl.load(sources + number * source_token, mask=there, other=0)


@triton.jit(do_not_specialize=["source_item", "target_item", "chosen_item", "tokens", "merging"])
def _settle(
    sources, targets, chosen, slot, kept, joining, into, source_item, source_token, target_item,
    target_token, chosen_item, chosen_token, tokens, merging,
    CHOSEN: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The first programs settle the tokens that stay, the others those that merge, by what they join."""
    item, parts = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, BLOCK)
    sources += item * source_item
    chosen += item * chosen_item
    staying = tl.program_id(1) < parts
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = token - parts * BLOCK
    joins = (mine >= 0) & (mine < merging)
    number, source = _merging(sources, chosen, mine, joins, source_token, chosen_token, CHOSEN)
    target = tl.load(targets + item * target_item + number * target_token, mask=joins, other=0)
    token = tl.where(staying, token.to(tl.int64), target)
    before, gone = tl.zeros([BLOCK, OTHERS], tl.int32), tl.zeros([BLOCK, OTHERS], tl.int32)
    for start in range(0, merging, OTHERS):
        other = start + tl.arange(0, OTHERS)
        there = other < merging
        _, goes = _merging(sources, chosen, other, there, source_token, chosen_token, CHOSEN)
        before += ((goes[None, :] < token[:, None]) & there[None, :]).to(tl.int32)
        gone += ((goes[None, :] == token[:, None]) & there[None, :]).to(tl.int32)
    row = token - tl.sum(before, 1)
    stays = staying & (token < tokens) & (tl.sum(gone, 1) == 0)
    tl.store(slot + item * tokens + token, row, mask=stays)
    tl.store(kept + item * (tokens - merging) + row, token, mask=stays)
    tl.store(slot + item * tokens + source, row, mask=joins)
    tl.store(joining + item * merging + mine, source, mask=joins)
    tl.store(into + item * merging + mine, row, mask=joins)
