"""Learners on the tokens that run them: counting sorts, then products on prefixes of the sorted tokens.

The tokens of a learner are the first of a list.  Where tokens run the first k learners, one list by falling
k serves all; where they run any set, each learner has its own, and sums are made for tokens as they
come.  Every grid has the size of the worst case, and a block behind the end of its list ends at once, so
the device is never waited for.  Each token is written by one program: no atomics, one result in all runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.shapes import blocks, power

SORTED, AT_ONCE = 128, 32  # tokens of a program that sorts, and blocks that it sums at once
# Tokens, results, what is summed at once, and warps, of a product; measured on an H200.
SMALL, LARGE, LARGE_GATED = (64, 64, 32, 4), (128, 128, 64, 8), (128, 128, 32, 8)
MANY = 4096  # tokens from which on large blocks fill a device, in half precision


class Choice(NamedTuple):
    """Which of L learners T tokens run.

    The tokens of learner n are the first ``counts[n]`` of ``order[n]``: ``[L]`` and ``[L, T]`` int32.  With
    a mask they are those where ``runs [T, L]`` is not 0, else those where it is more than n.
    """

    runs: Tensor
    order: Tensor
    counts: Tensor
    mask: bool

    @staticmethod
    def by_count(k: Tensor, learners: int) -> Choice:
        """Of tokens that run the first ``k [B, N]`` int64 of so many learners."""
        runs = k.reshape(-1, 1)
        order, counts = sort_by_count(runs.t(), learners)
        return Choice(runs.expand(-1, learners), order.expand(learners, -1), counts[0], mask=False)

    @staticmethod
    def by_mask(run: Tensor) -> Choice:
        """Of tokens that run any set: ``[B, N, L]`` bool."""
        runs = run.flatten(0, 1).view(torch.uint8)
        order, counts = sort_by_count(runs.t(), 1)
        return Choice(runs, order, counts[:, 0], mask=True)


def run_learners(
    x: Tensor,
    choice: Choice,
    bent: tuple[Tensor, Tensor],
    factor: tuple[Tensor, Tensor] | None,
    down: tuple[Tensor, Tensor],
    activation: str,
) -> Tensor:
    """``y[t] = d + sum over the learners n of t of act(x[t] w[n] + b[n]) u[n]``.

    With a factor it is ``act(x[t] w[n] + b[n]) (x[t] v[n] + c[n])`` that meets u.

    Args:
        x: ``[B, N, D]``.
        choice: of B N tokens.
        bent, factor: w and b, v and c: ``[L, D, H]`` and ``[L, H]``.
        down: u ``[L, H, D]`` and d ``[D]``.
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.

    Returns:
        ``[B, N, D]`` of x's type.
    """
    (learners, width, hidden), tokens = bent[0].shape, len(choice.runs)
    rows = x.reshape(tokens, width).contiguous()
    y = torch.empty_like(rows)
    weights = [t.contiguous() for t in (*bent, *(factor or bent), *down)]
    inner = x.new_empty(tokens, learners * hidden)
    large = LARGE_GATED if factor else LARGE
    high, across, depth, warps = large if tokens >= MANY and x.element_size() == 2 else SMALL
    height = blocks(tokens, high)
    runs, order, counts, mask = choice
    _hidden[(height, blocks(hidden, across), learners)](
        rows, order, counts, *weights[:4], inner, order.stride(0), tokens,
        learners * hidden, width, hidden,
        activation, factor is not None, high, across, depth, num_warps=warps,
    )  # fmt: skip
    _summed[(height, blocks(width, across))](
        inner, order, runs, *weights[4:], y, *runs.stride(), tokens, learners,
        learners * hidden, width, hidden, mask, high, across, depth, num_warps=warps,
    )  # fmt: skip
    return y.reshape(x.shape)


def sort_by_count(k: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``k [S, T]`` as ``order [S, T]`` int32, tokens by falling k and then by index, and ``[S, most]`` int32, how
    many of them have a k above 0, 1 and so on.

    Below 0 counts as 0 and above ``most`` as ``most``.
    """
    lists, tokens = k.shape
    parts, levels = blocks(tokens, SORTED), power(most + 1, 2, 1024)
    seen = k.new_empty(lists, parts, levels, dtype=torch.int32)
    order, count = seen.new_empty(lists, tokens), seen.new_empty(lists, most)
    grid = (parts, lists)
    _counted[grid](k, seen, *k.stride(), tokens, most, parts, SORTED, levels)
    _sorted[grid](k, seen, order, count, *k.stride(), tokens, most, parts, SORTED, AT_ONCE, levels)
    return order, count


@triton.jit
def _runs(k, of_list, of_token, tokens, most, BLOCK: tl.constexpr):
    """Tokens of a block, which of them are there, and how many learners each runs."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    at = k + tl.program_id(1).to(tl.int64) * of_list + token.to(tl.int64) * of_token
    given = tl.load(at, mask=there, other=0).to(tl.int64)
    return token, there, tl.minimum(tl.maximum(given, 0), most).to(tl.int32)


@triton.jit(do_not_specialize=["of_list", "of_token", "tokens", "most", "parts"])
def _counted(
    k, seen, of_list, of_token, tokens, most, parts, BLOCK: tl.constexpr, LEVELS: tl.constexpr
):
    """How many tokens of a block run each number of learners."""
    _, there, mine = _runs(k, of_list, of_token, tokens, most, BLOCK)
    level = tl.arange(0, LEVELS)
    here = (mine[:, None] == level[None, :]) & there[:, None]
    part = tl.program_id(1) * parts + tl.program_id(0)
    tl.store(seen + part * LEVELS + level, tl.sum(here.to(tl.int32), 0))


@triton.jit(do_not_specialize=["of_list", "of_token", "tokens", "most", "parts"])
def _sorted(
    k, seen, order, count, of_list, of_token, tokens, most, parts,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Behind tokens that run more, behind those of earlier blocks, behind the earlier ones of the block."""
    block, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    level = tl.arange(0, LEVELS)
    seen += number * parts * LEVELS
    total, before = tl.zeros([LEVELS], tl.int32), tl.zeros([LEVELS], tl.int32)
    for start in range(0, parts, AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        there = (other < parts)[:, None]
        found = tl.load(seen + other[:, None] * LEVELS + level[None, :], mask=there, other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((other < block)[:, None], found, 0), 0)
    above = tl.sum(tl.where(level[:, None] > level[None, :], total[:, None], 0), 0)
    if block == 0:
        tl.store(count + number * most + level, above, mask=level < most)
    token, inside, mine = _runs(k, of_list, of_token, tokens, most, BLOCK)
    here = ((mine[:, None] == level[None, :]) & inside[:, None]).to(tl.int32)
    place = tl.sum(here * ((above + before)[None, :] + tl.cumsum(here, 0) - 1), 1)
    tl.store(order + number * tokens + place, token, mask=inside)


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


@triton.jit(do_not_specialize=["of_learner", "tokens"])
def _hidden(
    x, order, count, w, b, v, c, inner, of_learner, tokens, across, width, hidden,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Hidden values of one learner for a block of the tokens that run it."""
    first, learner = tl.program_id(0) * ROWS, tl.program_id(2)
    runs = tl.load(count + learner)
    if first < runs:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        there, wanted = row < runs, column < hidden
        order += learner.to(tl.int64) * of_learner
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
            inner + token[:, None] * across + (learner * hidden + column)[None, :],
            value.to(inner.dtype.element_ty), mask=there[:, None] & wanted[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["of_token", "of_learner", "tokens", "learners"])
def _summed(
    inner, order, runs, down, bias, y, of_token, of_learner, tokens, learners, across, width, hidden,
    MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Results of a block of tokens, from the learners that any of them runs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, wanted = row < tokens, column < width
    token = (row if MASK else tl.load(order + row, mask=there, other=0)).to(tl.int64)
    begin = tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32) + begin[None, :]
    for learner in range(0, learners):
        given = tl.load(runs + token * of_token + learner * of_learner, mask=there, other=0)
        mine = given > (0 if MASK else learner)
        if tl.max(mine.to(tl.int32), 0) > 0:
            for start in range(0, hidden, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                at = learner * hidden + depth
                value = tl.load(
                    inner + token[:, None] * across + at[None, :],
                    mask=mine[:, None] & (depth < hidden)[None, :], other=0.0,
                )  # fmt: skip
                weight = tl.load(
                    down + at.to(tl.int64)[:, None] * width + column[None, :],
                    mask=(depth < hidden)[:, None] & wanted[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(value, weight, total, input_precision="ieee")
    tl.store(
        y + token[:, None] * width + column[None, :],
        total.to(y.dtype.element_ty), mask=there[:, None] & wanted[None, :],
    )  # fmt: skip
