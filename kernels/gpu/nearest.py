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
    """Sources and targets that are given one by one: ``[B, S]`` and ``[B, T]`` int64, in any strides."""

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
    _launch(
        unit, size, (into, into, into), best, into, tokens.first, first, tokens[1:], row, "second"
    )
    return best, into


def match_pairs(unit: Tensor, size: Tensor, tokens: Listed) -> tuple[Tensor, Tensor]:
    """The same for listed tokens, with the target itself in place of its row; ``unit`` begins behind the prefix."""
    best = unit.new_empty(tokens.sources.shape)
    into = unit.new_empty(tokens.sources.shape, dtype=torch.int64)
    first, counts = size.shape[1] - unit.shape[1], (tokens[0].shape[1], tokens[1].shape[1])
    _launch(unit, size, (*tokens, into), best, into, first, (0, 0), counts, 0, "pairs")
    return best, into


def match_listed(unit: Tensor, size: Tensor, tokens: Listed, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, as of :func:`match_every_second`, for listed tokens whose targets stand behind the prefix.

    Writes the row of each source's target to ``slot [B, N]`` too, and returns plain similarities.
    """
    batch, sources = tokens.sources.shape
    first = size.shape[1] - unit.shape[1]
    best = unit.new_empty(batch, sources)
    into = unit.new_empty(batch, sources, dtype=torch.int64)
    counts = (sources, tokens.targets.shape[1])
    _launch(unit, size, (*tokens, slot), best, into, first, (0, 0), counts, first, "rows")
    return best, into


def _launch(
    unit: Tensor, size: Tensor, lists: tuple[Tensor, Tensor, Tensor], best: Tensor, into: Tensor,
    first: int, start: tuple[int, int], counts: tuple[int, int], row: int, kind: str,
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
    strides = (*size.stride(), *joining.stride(), *kept.stride())
    _nearest[(batch, height, splits)](
        unit, size, joining, kept, slot, tops, numbers, *strides, size.shape[1], *ends, rows, depth,
        start[1], targets, span, split, kind, PADDING, block, TARGETS, depth_of(depth),
    )  # fmt: skip
    if split:
        _best_of[(batch, blocks(sources, LANES))](
            tops, numbers, size, joining, kept, slot, best, into, *strides, size.shape[1], *ends,
            splits, kind, PADDING, LANES,
        )  # fmt: skip


@triton.jit
def _side(number, there, listed, stride, first, KIND: tl.constexpr):
    """Tokens of a side by number."""
    if KIND == "second":
        return (first + 2 * number).to(tl.int64)
    else:
        return tl.load(listed + number * stride, mask=there, other=0)


@triton.jit
def _write(
    top, number, source, inside, held, best, into, kept, kept_token, slot, first_row,
    KIND: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The similarity and the outgoing row of each source's target, or the target."""
    target = (first_row + number).to(tl.int64)
    if KIND == "pairs":
        target = tl.load(kept + number * kept_token, mask=inside, other=0)
    if KIND == "rows":
        tl.store(slot + source, target, mask=inside)
    else:  # padding merges before all others
        top = tl.where(held == 0, PADDING, top)
    tl.store(best, top, mask=inside)
    tl.store(into, target, mask=inside)


@triton.jit(
    do_not_specialize=[
        "size_item", "joining_item", "kept_item", "tokens", "first", "first_source", "sources",
        "first_row", "rows", "first_target", "targets", "span",
    ]
)  # fmt: skip
def _nearest(
    unit, size, joining, kept, slot, best, into, size_item, size_token, joining_item, joining_token,
    kept_item, kept_token, tokens, first, first_source, sources, first_row, rows, depth,
    first_target, targets, span, SPLIT: tl.constexpr, KIND: tl.constexpr, PADDING: tl.constexpr,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    unit += item * rows * depth
    size += item * size_item
    joining += item * joining_item
    kept += item * kept_item
    mine = tl.program_id(1) * SOURCES + tl.arange(0, SOURCES)
    inside = mine < sources
    source = _side(mine, inside, joining, joining_token, first_source, KIND)
    top = tl.full([SOURCES], float("-inf"), tl.float32)
    chosen = tl.zeros([SOURCES], tl.int32)
    begin = tl.program_id(2) * span
    for start in range(begin, tl.minimum(begin + span, targets), TARGETS):
        number = start + tl.arange(0, TARGETS)
        there = number < targets
        target = _side(number, there, kept, kept_token, first_target, KIND)
        alike = products(
            unit, source - first, inside, target - first, there, depth, SOURCES, TARGETS, DEPTH
        )
        held = tl.load(size + target * size_token, mask=there, other=0.0)
        real = (held != 0)[None, :] & (alike == alike)  # NaN is never best
        alike = tl.where(there[None, :], tl.where(real, alike, -PADDING), float("-inf"))
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
            top, chosen, source, inside, held, best + to, into + to, kept, kept_token,
            slot + item * tokens, first_row, KIND, PADDING,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "size_item", "joining_item", "kept_item", "tokens", "first", "first_source", "sources",
        "first_row", "splits",
    ]
)  # fmt: skip
def _best_of(
    tops, numbers, size, joining, kept, slot, best, into, size_item, size_token, joining_item,
    joining_token, kept_item, kept_token, tokens, first, first_source, sources, first_row, splits,
    KIND: tl.constexpr, PADDING: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The best of all parts; of equal ones the first, whose targets come before the others'."""
    item = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = mine < sources
    source = _side(mine, inside, joining + item * joining_item, joining_token, first_source, KIND)
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
        top, chosen, source, inside, held, best + to, into + to, kept + item * kept_item,
        kept_token, slot + item * tokens, first_row, KIND, PADDING,
    )  # fmt: skip
