"""``keep_tokens`` in Triton; see reference.py for what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.gpu.ranking import rank, select
from thresher.kernels.gpu.rows import copy_rows
from thresher.kernels.gpu.shapes import blocks, demand, demand_prefix, power
from thresher.kernels.keep_tokens.reference import check

TOKENS, WIDTH = 128, 32  # of a block of dropped tokens


def keep_tokens(
    x: Tensor, score: Tensor, keep: int, protected: int, fuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition's results, for float16, bfloat16 and float32.

    Raises:
        ValueError: ``keep`` cannot be reached, or the prefix or score does not fit x.
    """
    batch, tokens, width = x.shape
    check(tokens, keep, protected, fuse)
    demand_prefix("keep_tokens", protected, tokens)
    demand("keep_tokens", "score", score, (batch, tokens))
    passing = keep - int(fuse)
    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    kept = slot.new_empty(batch, keep)
    position = rank(score, None, protected)
    # The fused token stands for the best of those that do not stay.
    select(position, slot, kept, kept[:, passing:], passing - protected, int(fuse))
    y = x.new_empty(batch, keep, width)
    copy_rows(x, kept[:, :passing], y[:, :passing])
    if fuse:
        channels = power(width, 1, WIDTH)
        _fuse[(batch, blocks(width, channels))](
            x, score, slot, y[:, passing:], *x.stride(), *score.stride(), y.stride(0), tokens,
            width, TOKENS, channels,
        )  # fmt: skip
    return y, slot, kept


@triton.jit(do_not_specialize=["score_item", "y_item", "tokens"])
def _fuse(
    x, score, slot, y, x_item, x_token, x_channel, score_item, score_token, y_item, tokens, width,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    wanted = channel < width
    fused = tl.zeros([TOKENS, WIDTH], tl.float32)
    for start in range(0, tokens, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        dropped = tl.load(slot + item * tokens + token, mask=token < tokens, other=0) < 0
        weight = tl.load(score + item * score_item + token * score_token, mask=dropped, other=0.0)
        rows = tl.load(
            x + item * x_item + token[:, None] * x_token + channel[None, :] * x_channel,
            mask=dropped[:, None] & wanted[None, :], other=0.0,
        )  # fmt: skip
        fused += weight.to(tl.float32)[:, None] * rows.to(tl.float32)
    total = tl.sum(fused, 0)
    tl.store(y + item * y_item + channel, total.to(y.dtype.element_ty), mask=wanted)
