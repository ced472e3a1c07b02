"""Outgoing rows: copied from a token, or merged from a token and those that join it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.shapes import blocks, power

WIDTH, ELEMENTS = 512, 2048  # channels and values of a block
LIST, MEMBERS = 128, 16  # joining tokens that are looked through, and that are read, at once


def copy_rows(x: Tensor, index: Tensor, y: Tensor, aside: Tensor | None = None) -> None:
    """``y[b, j] = x[b, index[b, j]]``, or ``aside[b, j]`` where the index is negative.

    Args:
        x: ``[B, N, C]`` of any type that Triton has.
        index: ``[B, K]`` int64; positions that are not there give zeros.
        y: ``[B, K, C]``, written.
        aside: ``[B, K, C]``.
    """
    if x.dtype == torch.bool:
        x, y = x.view(torch.uint8), y.view(torch.uint8)
        aside = None if aside is None else aside.view(torch.uint8)
    batch, rows, width = y.shape
    other = x if aside is None else aside
    channels = power(width, 1, WIDTH)
    height = min(256, max(1, ELEMENTS // channels))
    _copy_rows[(batch, blocks(rows, height), blocks(width, channels))](
        x, index, other, y, *x.stride(), *index.stride(), *other.stride(), *y.stride(),
        x.shape[1], rows, width, aside is not None, height, channels,
    )  # fmt: skip


def merge_rows(
    x: Tensor, size: Tensor, kept: Tensor, joining: Tensor, into: Tensor, first: int,
    cosine: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outgoing tokens and their sizes.

    A group becomes the mean weighted with the sizes, and its size their sum.  With ``cosine`` it is
    the plain mean, and its size ``s + sum of cosine * s_joining``, never less than ``min(s, 1)``.  What
    joins with a size of 0 weighs nothing.

    Args:
        x: ``[B, N, C]``.
        size: ``[B, N]``.
        kept: ``[B, K]`` int64, the token of each row.
        joining: ``[B, J]`` int64, the tokens that join one of them.
        into: ``[B, J]`` int64, the row that each of those joins.
        first: rows before it are joined by none.
        cosine: ``[B, J]`` float32.

    Returns:
        ``[B, K, C]`` of x's type and ``[B, K]`` of size's.
    """
    (batch, rows), width = kept.shape, x.shape[2]
    y, out_size = x.new_empty(batch, rows, width), size.new_empty(batch, rows)
    channels = power(width, 1, WIDTH)
    _merge_rows[(batch * rows, blocks(width, channels))](
        x, size, kept, joining, into, into if cosine is None else cosine, y, out_size,
        *x.stride(), *size.stride(), rows, joining.shape[1], first, width,
        cosine is not None, LIST, MEMBERS, channels,
    )  # fmt: skip
    return y, out_size


@triton.jit(do_not_specialize=["index_item", "tokens", "rows"])
def _copy_rows(
    x, index, aside, y, x_item, x_token, x_channel, index_item, index_row, aside_item, aside_row,
    aside_channel, y_item, y_row, y_channel, tokens, rows, width,
    ASIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    there, wanted = row < rows, channel < width
    token = tl.load(index + item * index_item + row * index_row, mask=there, other=0)
    found = there & (token >= 0) & (token < tokens)
    value = tl.load(
        x + item * x_item + token[:, None] * x_token + channel[None, :] * x_channel,
        mask=found[:, None] & wanted[None, :], other=0,
    )  # fmt: skip
    if ASIDE:
        dropped = there & (token < 0)
        instead = tl.load(
            aside + item * aside_item + row[:, None] * aside_row + channel[None, :] * aside_channel,
            mask=dropped[:, None] & wanted[None, :], other=0,
        )  # fmt: skip
        value = tl.where(dropped[:, None], instead, value)
    tl.store(
        y + item * y_item + row[:, None] * y_row + channel[None, :] * y_channel,
        value, mask=there[:, None] & wanted[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["size_item", "rows", "join", "first"])
def _merge_rows(
    x, size, kept, joining, into, cosine, y, out_size, x_item, x_token, x_channel,
    size_item, size_token, rows, join, first, width,
    MEAN: tl.constexpr, LIST: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    item, row = at // rows, at % rows
    x += item * x_item
    size += item * size_item
    joining += item * join
    into += item * join
    token = tl.load(kept + at)
    own = tl.load(size + token * size_token).to(tl.float32)

    counts, gains = tl.zeros([LIST], tl.int32), tl.zeros([LIST], tl.float32)
    for start in range(0, tl.where(row < first, 0, join), LIST):
        number = start + tl.arange(0, LIST)
        joins = tl.load(into + number, mask=number < join, other=-1) == row
        member = tl.load(joining + number, mask=joins, other=0)
        part = tl.load(size + member * size_token, mask=joins, other=0.0).to(tl.float32)
        counts += (part != 0).to(tl.int32)
        if MEAN:
            part *= tl.load(cosine + item * join + number, mask=joins, other=0.0)
        gains += part
    count, total = tl.sum(counts), own + tl.sum(gains)
    if MEAN:
        total = tl.where(count > 0, tl.maximum(total, tl.minimum(own, 1.0)), own)
        divisor = 1.0 + count
        share = tl.div_rn(1.0, divisor)
    else:
        divisor = tl.where(total == 0, 1.0, total)
        share = tl.where(total == 0, 1.0, tl.div_rn(own, divisor))
    if tl.program_id(1) == 0:
        tl.store(out_size + at, total.to(out_size.dtype.element_ty))

    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    wanted = channel < width
    x += channel * x_channel
    merged = share * tl.load(x + token * x_token, mask=wanted, other=0.0).to(tl.float32)
    for start in range(0, tl.where(count > 0, join, 0), MEMBERS):
        number = start + tl.arange(0, MEMBERS)
        joins = tl.load(into + number, mask=number < join, other=-1) == row
        member = tl.load(joining + number, mask=joins, other=0)
        part = tl.load(size + member * size_token, mask=joins, other=0.0).to(tl.float32)
        real = part != 0
        if tl.max(real.to(tl.int32), 0) > 0:
            rows_of = tl.load(
                x[None, :] + member[:, None] * x_token,
                mask=real[:, None] & wanted[None, :],
                other=0.0,
            ).to(tl.float32)
            weight = share if MEAN else part / divisor
            merged += tl.sum(tl.where(real, weight, 0.0)[:, None] * rows_of, 0)
    tl.store(y + at * width + channel, merged.to(y.dtype.element_ty), mask=wanted)
