"""Learners on the tokens that run them: a counting sort, then products on prefixes of the sorted tokens.

Sorted by falling number of learners, the tokens of learner n are the first ``c_n``.  Every grid has
the size of the worst case, and a block whose first token runs fewer learners ends at once, so the
device is never waited for.  Each token is written by one program: no atomics, one result in all runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.shapes import blocks, power

SORTED, AT_ONCE = 128, 32  # tokens of a program that sorts, and blocks that it sums at once
# Tokens, results, what is summed at once, and warps, of a product; measured on an H200.
SMALL, LARGE, LARGE_GATED = (64, 64, 32, 4), (128, 128, 64, 8), (128, 128, 32, 8)
MANY = 4096  # tokens from which on large blocks fill a device, in half precision


def run_learners(
    x: Tensor,
    k: Tensor,
    bent: tuple[Tensor, Tensor],
    factor: tuple[Tensor, Tensor] | None,
    down: tuple[Tensor, Tensor],
    activation: str,
) -> Tensor:
    """``y[t] = d + sum over n < k[t] of act(x[t] w[n] + b[n]) u[n]``, with a factor ``x[t] v[n] + c[n]`` if given.

    Args:
        x: ``[B, N, D]``.
        k: ``[B, N]`` int64.
        bent, factor: w and b, v and c: ``[L, D, H]`` and ``[L, H]``.
        down: u ``[L, H, D]`` and d ``[D]``.
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.

    Returns:
        ``[B, N, D]`` of x's type.
    """
    (learners, width, hidden), tokens = bent[0].shape, k.numel()
    rows = x.reshape(tokens, width).contiguous()
    y = torch.empty_like(rows)
    if not tokens:
        return y.reshape(x.shape)
    order, runs = sort_by_count(k.reshape(tokens), learners)
    weights = [t.contiguous() for t in (*bent, *(factor or bent), *down)]
    inner = x.new_empty(tokens, learners * hidden)
    large = LARGE_GATED if factor else LARGE
    high, across, depth, warps = large if tokens >= MANY and x.element_size() == 2 else SMALL
    height = blocks(tokens, high)
    _hidden[(height, blocks(hidden, across), learners)](
        rows, order, runs, *weights[:4], inner, tokens, learners * hidden, width, hidden,
        activation, factor is not None, high, across, depth, num_warps=warps,
    )  # fmt: skip
    _summed[(height, blocks(width, across))](
        inner, order, runs, *weights[4:], y, tokens, learners * hidden, width, hidden,
        high, across, depth, num_warps=warps,
    )  # fmt: skip
    return y.reshape(x.shape)


def sort_by_count(k: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``k [T]`` as ``order [T]`` int32, tokens by falling k and then by index, and k in that order.

    Below 0 counts as 0 and above ``most`` as ``most``.
    """
    count, levels = blocks(len(k), SORTED), power(most + 1, 2, 32)
    seen = k.new_empty(count, levels, dtype=torch.int32)
    order, runs = k.new_empty(2, len(k), dtype=torch.int32)
    given = k.contiguous()
    _counted[(count,)](given, seen, len(k), most, SORTED, levels)
    _sorted[(count,)](given, seen, order, runs, len(k), most, count, SORTED, AT_ONCE, levels)
    return order, runs


@triton.jit(do_not_specialize=["tokens", "most"])
def _counted(k, seen, tokens, most, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """How many tokens of a block run each number of learners."""
    block = tl.program_id(0)
    token, level = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LEVELS)
    given = tl.load(k + token, mask=token < tokens, other=0)
    runs = tl.minimum(tl.maximum(given, 0), most).to(tl.int32)
    here = (runs[:, None] == level[None, :]) & (token < tokens)[:, None]
    tl.store(seen + block * LEVELS + level, tl.sum(here.to(tl.int32), 0))


@triton.jit(do_not_specialize=["tokens", "most", "count"])
def _sorted(
    k, seen, order, runs, tokens, most, count,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Behind tokens that run more, behind those of earlier blocks, behind the earlier ones of the block."""
    block = tl.program_id(0)
    token, level = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LEVELS)
    total, before = tl.zeros([LEVELS], tl.int32), tl.zeros([LEVELS], tl.int32)
    for start in range(0, count, AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        there = (other < count)[:, None]
        found = tl.load(seen + other[:, None] * LEVELS + level[None, :], mask=there, other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((other < block)[:, None], found, 0), 0)
    above = tl.sum(tl.where(level[:, None] > level[None, :], total[:, None], 0), 0)
    given = tl.load(k + token, mask=token < tokens, other=0)
    mine = tl.minimum(tl.maximum(given, 0), most).to(tl.int32)
    here = ((mine[:, None] == level[None, :]) & (token < tokens)[:, None]).to(tl.int32)
    place = tl.sum(here * ((above + before)[None, :] + tl.cumsum(here, 0) - 1), 1)
    tl.store(order + place, token, mask=token < tokens)
    tl.store(runs + place, mine, mask=token < tokens)


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value * tl.sigmoid(inner)
    elif ACTIVATION == "quick_gelu":
        value = value * tl.sigmoid(1.702 * value)
    elif ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)
    elif ACTIVATION == "silu":
        value = value * tl.sigmoid(value)
    return value


@triton.jit(do_not_specialize=["tokens"])
def _hidden(
    x, order, runs, w, b, v, c, inner, tokens, across, width, hidden,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Hidden values of one learner for a block of sorted tokens."""
    first, learner = tl.program_id(0) * ROWS, tl.program_id(2)
    if tl.load(runs + first) > learner:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        there, wanted = row < tokens, column < hidden
        token = tl.load(order + row, mask=there, other=0).to(tl.int64)
        matrix = learner.to(tl.int64) * width * hidden
        bent, factor = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            given = tl.load(
                x + token[:, None] * width + depth[None, :],
                mask=there[:, None] & (depth < width)[None, :], other=0.0,
            )  # fmt: skip
            at = matrix + depth[:, None] * hidden + column[None, :]
            held = (depth < width)[:, None] & wanted[None, :]
            bent = tl.dot(
                given, tl.load(w + at, mask=held, other=0.0), bent, input_precision="ieee"
            )
            if GATED:
                opened = tl.load(v + at, mask=held, other=0.0)
                factor = tl.dot(given, opened, factor, input_precision="ieee")
        bias = learner * hidden + column
        bent += tl.load(b + bias, mask=wanted, other=0.0).to(tl.float32)[None, :]
        value = _activated(bent, ACTIVATION)
        if GATED:
            value *= factor + tl.load(c + bias, mask=wanted, other=0.0).to(tl.float32)[None, :]
        tl.store(
            inner + row[:, None] * across + (learner * hidden + column)[None, :],
            value.to(inner.dtype.element_ty), mask=there[:, None] & wanted[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _summed(
    inner, order, runs, down, bias, y, tokens, across, width, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Results of a block of sorted tokens, from as many learners as its first token runs."""
    first = tl.program_id(0) * ROWS
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, wanted = row < tokens, column < width
    mine = tl.load(runs + row, mask=there, other=0)
    begin = tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32) + begin[None, :]
    for learner in range(0, tl.load(runs + first)):
        runs_it = mine > learner
        for start in range(0, hidden, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            at = learner * hidden + depth
            value = tl.load(
                inner + row[:, None] * across + at[None, :],
                mask=runs_it[:, None] & (depth < hidden)[None, :], other=0.0,
            )  # fmt: skip
            weight = tl.load(
                down + at.to(tl.int64)[:, None] * width + column[None, :],
                mask=(depth < hidden)[:, None] & wanted[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(value, weight, total, input_precision="ieee")
    token = tl.load(order + row, mask=there, other=0).to(tl.int64)
    tl.store(
        y + token[:, None] * width + column[None, :],
        total.to(y.dtype.element_ty), mask=there[:, None] & wanted[None, :],
    )  # fmt: skip
