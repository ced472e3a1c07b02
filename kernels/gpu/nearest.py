"""For each of many tokens the most similar of many others, without the matrix of similarities."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.pairs import depth_of, height_of, products
from thresher.kernels.gpu.shapes import blocks

PADDING = 1e4  # beyond every cosine
TARGETS = 64  # tokens that meet a block of sources at once
PROGRAMS = 512  # that fill a device: with fewer, the targets are split among more,
LEAST = 4  # blocks of targets each at least
LANES = 128  # sources of a program that chooses among the parts


class Listed(NamedTuple):
    """Sources and targets that are given one by one: ``[B, S]`` and ``[B, T]`` int64."""

    sources: Tensor
    targets: Tensor


class EverySecond(NamedTuple):
    """Sources at even and targets at odd positions from ``first`` on."""

    first: int
    sources: int
    targets: int


def match_every_second(
    unit: Tensor, size: Tensor, tokens: EverySecond, row: int
) -> tuple[Tensor, Tensor]:
    """What a matching of even with odd positions decides by.

    Args:
        unit: of :func:`~thresher.kernels.gpu.pairs.unit_vectors`, from ``tokens.first`` on.
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
    sources, targets = counts
    block = height_of(sources)
    joining, kept, slot = lists
    height = blocks(sources, block)
    tiles = blocks(targets, TARGETS)
    splits = max(1, min(tiles // LEAST, PROGRAMS // max(batch * height, 1)))
    span = blocks(tiles, splits) * TARGETS
    split = splits > 1
    tops = best.new_empty(splits, batch, sources) if split else best
    numbers = into.new_empty(splits, batch, sources) if split else into
    ends = (first, start[0], sources, row)
    _nearest[(batch, height, splits)](
        unit, size, joining, kept, slot, tops, numbers, *size.stride(), joining.stride(0),
        kept.stride(0), size.shape[1], *ends, rows, depth, start[1], targets, span,
        split, listed, PADDING, block, TARGETS, depth_of(depth),
    )  # fmt: skip
    if split:
        _best_of[(batch, blocks(sources, LANES))](
            tops, numbers, size, joining, slot, best, into, *size.stride(), joining.stride(0),
            size.shape[1], *ends, splits, listed, PADDING, LANES,
        )  # fmt: skip


@triton.jit
def _sources(mine, inside, joining, first_source, LISTED: tl.constexpr):
    """Tokens of the sources by number."""
    if LISTED:
        return tl.load(joining + mine, mask=inside, other=0)
    else:
        return (first_source + 2 * mine).to(tl.int64)


@triton.jit
def _write(
    top, number, source, inside, held, best, into, slot, first_row,
    LISTED: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The similarity and the outgoing row of each source's target."""
    row = (first_row + number).to(tl.int64)
    if LISTED:
        tl.store(slot + source, row, mask=inside)
    else:  # padding merges before all others
        top = tl.where(held == 0, PADDING, top)
    tl.store(best, top, mask=inside)
    tl.store(into, row, mask=inside)


@triton.jit(
    do_not_specialize=[
        "size_item", "joining_item", "kept_item", "tokens", "first", "first_source", "sources",
        "first_row", "rows", "first_target", "targets", "span",
    ]
)  # fmt: skip
def _nearest(
    unit, size, joining, kept, slot, best, into, size_item, size_token, joining_item, kept_item,
    tokens, first, first_source, sources, first_row, rows, depth, first_target, targets, span,
    SPLIT: tl.constexpr, LISTED: tl.constexpr, PADDING: tl.constexpr, SOURCES: tl.constexpr,
    TARGETS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    unit += item * rows * depth
    size += item * size_item
    mine = tl.program_id(1) * SOURCES + tl.arange(0, SOURCES)
    inside = mine < sources
    source = _sources(mine, inside, joining + item * joining_item, first_source, LISTED)
    top = tl.full([SOURCES], float("-inf"), tl.float32)
    chosen = tl.zeros([SOURCES], tl.int32)
    begin = tl.program_id(2) * span
    for start in range(begin, tl.minimum(begin + span, targets), TARGETS):
        number = start + tl.arange(0, TARGETS)
        there = number < targets
        if LISTED:
            target = tl.load(kept + item * kept_item + number, mask=there, other=0)
        else:
            target = (first_target + 2 * number).to(tl.int64)
        alike = products(
            unit, source - first, inside, target - first, there, depth, SOURCES, TARGETS, DEPTH
        )
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
    if SPLIT:
        part = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + item) * sources + mine
        tl.store(best + part, top, mask=inside)
        tl.store(into + part, chosen.to(tl.int64), mask=inside)
    else:
        held = tl.load(size + source * size_token, mask=inside, other=1.0)
        to = item * sources + mine
        _write(
            top, chosen, source, inside, held, best + to, into + to, slot + item * tokens, first_row,
            LISTED, PADDING,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "size_item", "joining_item", "tokens", "first", "first_source", "sources", "first_row",
        "splits",
    ]
)  # fmt: skip
def _best_of(
    tops, numbers, size, joining, slot, best, into, size_item, size_token, joining_item, tokens,
    first, first_source, sources, first_row, splits,
    LISTED: tl.constexpr, PADDING: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The best of all parts; of equal ones the first, whose targets come before the others'."""
    item = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = mine < sources
    source = _sources(mine, inside, joining + item * joining_item, first_source, LISTED)
    top = tl.full([LANES], float("-inf"), tl.float32)
    chosen = tl.zeros([LANES], tl.int64)
    for part in range(0, splits):
        at = (part * tl.num_programs(0) + item) * sources + mine
        found = tl.load(tops + at, mask=inside, other=0.0)
        chosen = tl.where(found > top, tl.load(numbers + at, mask=inside, other=0), chosen)
        top = tl.maximum(top, found)
    held = tl.load(size + item * size_item + source * size_token, mask=inside, other=1.0)
    to = item * sources + mine
    _write(
        top, chosen, source, inside, held, best + to, into + to, slot + item * tokens, first_row,
        LISTED, PADDING,
    )  # fmt: skip
