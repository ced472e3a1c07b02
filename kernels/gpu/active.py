"""Products of few tokens that skip the rows of a matrix which no token needs.

Rows are read under a mask, so a row that is skipped costs no traffic.  What a product sums over is split
among programs, since one column block alone would not fill a device; their sums are added in a fixed
order by a second kernel, so results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.shapes import blocks, power

MOST_TOKENS = 8  # of a product that skips: with more the union of what they need fills up
# Measured on an H200, as are the warps: larger blocks were up to twice as slow.
PROGRAMS = 2048  # that fill a device with loads
ROWS, COLUMNS = 32, 128  # of a block of the matrix, which is read at once
NEURONS, DEPTH = 2, 2048  # of a block of rows that are multiplied one by one
LANES = 64  # outputs of a program that adds up


def sum_of_rows(x: Tensor, matrix: Tensor, threshold: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(x * (|x| > threshold)) @ matrix``.

    Args:
        x: ``[T, I]``, at most :data:`MOST_TOKENS` tokens.
        matrix: ``[I, O]``.
        threshold: ``[I]`` float32; None keeps all but exact zeros.
        dtype: of the result.

    Returns:
        ``[T, O]``.
    """
    (tokens, width), columns = x.shape, matrix.shape[1]
    across = power(columns, 16, COLUMNS)
    programs = blocks(columns, across)
    splits = max(1, min(blocks(PROGRAMS, max(programs, 1)), blocks(width, ROWS)))
    span = blocks(blocks(width, splits), ROWS) * ROWS
    sums = x.new_empty(splits, tokens, columns, dtype=torch.float32)
    limits = x if threshold is None else threshold
    _sum_of_rows[(programs, splits)](
        x, matrix, limits, sums, *x.stride(), *matrix.stride(), limits.stride(-1),
        tokens, width, columns, span, threshold is not None, power(tokens, 1, MOST_TOKENS), ROWS, across,
        num_warps=2,
    )  # fmt: skip
    return add_up(sums, dtype)


def add_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """``sums [S, ...]`` float32 over the first axis, in its order."""
    y = sums.new_empty(sums.shape[1:], dtype=dtype)
    splits, count = len(sums), y.numel()
    _add_up[(blocks(count, LANES),)](sums, y, splits, count, LANES, power(splits, 1, LANES))
    return y


def products_of_rows(x: Tensor, matrix: Tensor, h: Tensor, threshold: Tensor) -> Tensor:
    """``h * (x @ matrix.T)`` where ``|h| > threshold``, elsewhere 0.

    Args:
        x: ``[T, I]``, at most :data:`MOST_TOKENS` tokens.
        matrix: ``[F, I]``; a row that no token needs is not read.
        h: ``[T, F]``.
        threshold: ``[F]`` float32.

    Returns:
        ``[T, F]`` float32.
    """
    (tokens, width), neurons = x.shape, matrix.shape[0]
    hidden = x.new_empty(tokens, neurons, dtype=torch.float32)
    _products_of_rows[(blocks(neurons, NEURONS),)](
        x, matrix, h, threshold, hidden, *x.stride(), *matrix.stride(), *h.stride(),
        threshold.stride(0), tokens, width, neurons,
        power(tokens, 1, MOST_TOKENS), NEURONS, power(width, 16, DEPTH),
    )  # fmt: skip
    return hidden


@triton.jit(do_not_specialize=["tokens", "span"])
def _sum_of_rows(
    x, matrix, threshold, sums, x_token, x_channel, matrix_row, matrix_column, threshold_channel,
    tokens, width, columns, span,
    THRESHOLD: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, TOKENS)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    there, wanted = token < tokens, column < columns
    first = tl.program_id(1) * span
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(first, tl.minimum(first + span, width), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < width
        value = tl.load(
            x + token[:, None] * x_token + row[None, :] * x_channel,
            mask=there[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if THRESHOLD:
            limit = tl.load(threshold + row * threshold_channel, mask=inside, other=0.0)
            value = tl.where(tl.abs(value) <= limit[None, :], 0.0, value)
        used = tl.max((value != 0).to(tl.int32), 0) > 0  # NaN is not 0
        part = tl.load(
            matrix + row[:, None] * matrix_row + column[None, :] * matrix_column,
            mask=used[:, None] & wanted[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        for one in tl.static_range(TOKENS):
            own = tl.sum(tl.where(token[:, None] == one, value, 0.0), 0)
            sum_of_one = tl.sum(own[:, None] * part, 0)
            total += tl.where(token[:, None] == one, sum_of_one[None, :], 0.0)
    at = (tl.program_id(1) * tokens + token).to(tl.int64)
    tl.store(
        sums + at[:, None] * columns + column[None, :], total, mask=there[:, None] & wanted[None, :]
    )


@triton.jit(do_not_specialize=["splits"])
def _add_up(sums, y, splits, count, LANES: tl.constexpr, SPLITS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = at < count
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, splits, SPLITS):
        part = (start + tl.arange(0, SPLITS)).to(tl.int64)
        held = (part < splits)[:, None] & inside[None, :]
        total += tl.sum(
            tl.load(sums + part[:, None] * count + at[None, :], mask=held, other=0.0), 0
        )
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "neurons"])
def _products_of_rows(
    x, matrix, h, threshold, hidden, x_token, x_channel, matrix_row, matrix_column, h_token,
    h_neuron, threshold_neuron, tokens, width, neurons,
    TOKENS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, TOKENS)
    neuron = (tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)).to(tl.int64)
    there, inside = token < tokens, neuron < neurons
    both = there[:, None] & inside[None, :]
    value = tl.load(
        h + token[:, None] * h_token + neuron[None, :] * h_neuron, mask=both, other=0.0
    ).to(tl.float32)
    limit = tl.load(threshold + neuron * threshold_neuron, mask=inside, other=0.0)
    kept = both & ~(tl.abs(value) <= limit[None, :])  # NaN is kept
    used = tl.max(kept.to(tl.int32), 0) > 0
    product = tl.zeros([TOKENS, NEURONS], tl.float32)
    for start in range(0, width, DEPTH):
        channel = (start + tl.arange(0, DEPTH)).to(tl.int64)
        wanted = channel < width
        part = tl.load(
            matrix + neuron[:, None] * matrix_row + channel[None, :] * matrix_column,
            mask=used[:, None] & wanted[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        own = tl.load(
            x + token[:, None] * x_token + channel[None, :] * x_channel,
            mask=there[:, None] & wanted[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        for one in tl.static_range(TOKENS):
            of_one = tl.sum(tl.where(token[:, None] == one, own, 0.0), 0)
            result = tl.sum(of_one[None, :] * part, 1)
            product += tl.where(token[:, None] == one, result[None, :], 0.0)
    tl.store(
        hidden + token[:, None] * neurons + neuron[None, :],
        tl.where(kept, value * product, 0.0), mask=both,
    )  # fmt: skip
