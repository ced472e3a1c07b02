"""For each of many tokens the most similar of many others, without the matrix of similarities."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.shapes import blocks, power

EPSILON = 1e-12  # a zero vector gets similarity 0 to everything
PADDING = 1e4  # beyond every cosine
ELEMENTS = 4096  # of a block of unit vectors
TARGETS, DEPTH = 64, 32  # tokens and channels that meet a block of sources at once
MANY = 8192  # from so many sources on, larger blocks still fill a device


class Listed(NamedTuple):
    """Sources and targets that are given one by one: ``[B, S]`` and ``[B, T]`` int64."""

    sources: Tensor
    targets: Tensor


class EverySecond(NamedTuple):
    """Sources at even and targets at odd positions from ``first`` on."""

    first: int
    sources: int
    targets: int


def unit_vectors(metric: Tensor, first: int) -> Tensor:
    """Means over the heads as unit vectors: ``[B, H, N, d]`` to ``[B, N - first, d]`` float32."""
    batch, heads, tokens, depth = metric.shape
    count = tokens - first
    unit = metric.new_empty(batch, count, depth, dtype=torch.float32)
    width = power(depth, 16, 1 << 16)
    rows = max(1, ELEMENTS // width)
    _unit_vectors[(batch, blocks(count, rows))](
        metric, unit, *metric.stride(), heads, first, count, depth, EPSILON, rows, width
    )
    return unit


def match_every_second(
    unit: Tensor, size: Tensor, tokens: EverySecond, row: int
) -> tuple[Tensor, Tensor]:
    """What a matching of even with odd positions decides by.

    Args:
        unit: of :func:`unit_vectors`, from ``tokens.first`` on.
        size: ``[B, N]``; a target of size 0 is chosen only where there is nothing else.
        tokens: the two sides.
        row: outgoing row of the first target.

    Returns:
        ``[B, S]`` float32, the similarity to the nearest target, of padding 1e4; and ``[B, S]`` int64,
        the outgoing row of that target.
    """
    batch = unit.shape[0]
    best = unit.new_empty(batch, tokens.sources)
    into = unit.new_empty(batch, tokens.sources, dtype=torch.int64)
    first = (tokens.first + tokens.first % 2, tokens.first + 1 - tokens.first % 2)
    _launch(unit, size, (into, into, into), best, into, tokens.first, first, tokens[1:], row, False)
    return best, into


def match_listed(unit: Tensor, size: Tensor, tokens: Listed, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The same for listed tokens; ``unit`` begins behind the prefix, and so do the rows of targets.

    Writes the row of each source's target to ``slot [B, N]`` too, and returns plain similarities.
    """
    batch, sources = tokens.sources.shape
    first = size.shape[1] - unit.shape[1]
    best = unit.new_empty(batch, sources)
    into = unit.new_empty(batch, sources, dtype=torch.int64)
    counts = (sources, tokens.targets.shape[1])
    _launch(unit, size, (*tokens, slot), best, into, first, (0, 0), counts, first, True)
    return best, into


def _launch(
    unit: Tensor, size: Tensor, lists: tuple[Tensor, Tensor, Tensor], best: Tensor, into: Tensor,
    first: int, start: tuple[int, int], counts: tuple[int, int], row: int, listed: bool,
) -> None:  # fmt: skip
    batch, rows, depth = unit.shape
    block = 64 if batch * counts[0] >= MANY else 16
    joining, kept, slot = lists
    _nearest[(batch, blocks(counts[0], block))](
        unit, size, joining, kept, slot, best, into, *size.stride(), joining.stride(0),
        kept.stride(0), size.shape[1], rows, depth, first, *start, *counts, row,
        listed, PADDING, block, TARGETS, power(depth, 16, DEPTH),
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "first", "count", "depth"])
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


@triton.jit(
    do_not_specialize=[
        "size_item", "joining_item", "kept_item", "tokens", "rows", "first", "first_source",
        "first_target", "sources", "targets", "first_row",
    ]
)  # fmt: skip
def _nearest(
    unit, size, joining, kept, slot, best, into, size_item, size_token, joining_item, kept_item,
    tokens, rows, depth, first, first_source, first_target, sources, targets, first_row,
    LISTED: tl.constexpr, PADDING: tl.constexpr, SOURCES: tl.constexpr, TARGETS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    unit += item * rows * depth
    size += item * size_item
    mine = tl.program_id(1) * SOURCES + tl.arange(0, SOURCES)
    inside = mine < sources
    if LISTED:
        source = tl.load(joining + item * joining_item + mine, mask=inside, other=0)
    else:
        source = (first_source + 2 * mine).to(tl.int64)
    top = tl.full([SOURCES], float("-inf"), tl.float32)
    chosen = tl.zeros([SOURCES], tl.int32)
    for start in range(0, targets, TARGETS):
        number = start + tl.arange(0, TARGETS)
        there = number < targets
        if LISTED:
            target = tl.load(kept + item * kept_item + number, mask=there, other=0)
        else:
            target = (first_target + 2 * number).to(tl.int64)
        alike = tl.zeros([SOURCES, TARGETS], tl.float32)
        for begin in range(0, depth, DEPTH):
            channel = begin + tl.arange(0, DEPTH)
            wanted = channel < depth
            left = tl.load(
                unit + (source - first)[:, None] * depth + channel[None, :],
                mask=inside[:, None] & wanted[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                unit + (target - first)[None, :] * depth + channel[:, None],
                mask=there[None, :] & wanted[:, None], other=0.0,
            )  # fmt: skip
            # Exact products: with TensorFloat-32 ties and near ties would be decided otherwise.
            alike = tl.dot(left, right, alike, input_precision="ieee")
        held = tl.load(size + target * size_token, mask=there, other=0.0)
        alike = tl.where((held == 0)[None, :], -PADDING, alike)
        alike = tl.where(
            there[None, :] & (alike == alike), alike, float("-inf")
        )  # NaN is never best
        peak = tl.max(alike, 1)
        equal = alike == peak[:, None]
        lowest = tl.min(tl.where(equal, number[None, :], 2147483647), 1)
        chosen = tl.where(peak > top, lowest, chosen)
        top = tl.maximum(top, peak)
    row = (first_row + chosen).to(tl.int64)
    if LISTED:
        tl.store(slot + item * tokens + source, row, mask=inside)
    else:  # padding merges before all others
        held = tl.load(size + source * size_token, mask=inside, other=1.0)
        top = tl.where(held == 0, PADDING, top)
    tl.store(best + item * sources + mine, top, mask=inside)
    tl.store(into + item * sources + mine, row, mask=inside)
