"""``class_attention`` in Triton; see reference.py for what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.class_attention.reference import check
from thresher.kernels.gpu.shapes import demand, power

BLOCK, ELEMENTS = 128, 8192  # most keys of a block, and most of their values


def class_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, row: int) -> Tensor:
    """The definition's result, for float16, bfloat16 and float32.

    Raises:
        ValueError: ``row`` is not a query, or a shape does not fit q.
    """
    check(q, row)
    batch, heads, _, depth = q.shape
    tokens = k.shape[2]
    demand("class_attention", "k", k, (batch, heads, tokens, depth))
    attention = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    shift = attention
    if bias is not None:
        at_row = bias if bias.dim() < 2 else bias.select(-2, row if bias.shape[-2] > 1 else 0)
        shift = at_row.expand(batch, heads, tokens)
    mask = shift.dtype == torch.bool
    width = power(depth, 16, ELEMENTS)
    _attend[(batch, heads)](
        q[:, :, row], k, shift.view(torch.uint8) if mask else shift, attention,
        *q[:, :, row].stride(), *k.stride(), *shift.stride(), heads, tokens, depth, scale,
        torch.finfo(torch.float32).min, bias is not None, mask,
        power(tokens, 16, min(BLOCK, ELEMENTS // width)), width,
    )  # fmt: skip
    return attention.mean(1)


@triton.jit(do_not_specialize=["heads", "tokens", "scale", "lowest"])
def _attend(
    q, k, bias, attention, q_item, q_head, q_channel, k_item, k_head, k_token, k_channel,
    bias_item, bias_head, bias_token, heads, tokens, depth, scale, lowest,
    BIAS: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    wanted = channel < depth
    query = tl.load(
        q + item * q_item + head * q_head + channel * q_channel, mask=wanted, other=0.0
    ).to(tl.float32)
    k += item * k_item + head * k_head
    bias += item * bias_item + head * bias_head
    attention += (item * heads + head) * tokens

    # The logits wait in the output, and the barriers keep the passes over it apart.
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, tokens, BLOCK):
        token = (start + tl.arange(0, BLOCK)).to(tl.int64)
        there = token < tokens
        keys = tl.load(
            k + token[:, None] * k_token + channel[None, :] * k_channel,
            mask=there[:, None] & wanted[None, :], other=0.0,
        )  # fmt: skip
        logit = scale * tl.sum(keys.to(tl.float32) * query[None, :], 1)
        if BIAS:
            shift = tl.load(bias + token * bias_token, mask=there, other=0)
            if MASK:
                logit = tl.where(shift != 0, logit, lowest)
            else:
                logit += shift.to(tl.float32)
        tl.store(attention + token, logit, mask=there)
        most = tl.maximum(most, tl.where(there, logit, float("-inf")))
    peak = tl.max(most, 0)
    tl.debug_barrier()
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(attention + token, mask=token < tokens, other=float("-inf"))
        sums += tl.exp(logit - peak)
    total = tl.sum(sums, 0)
    tl.debug_barrier()
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(attention + token, mask=token < tokens, other=0.0)
        weight = tl.div_rn(tl.exp(logit - peak), total + tl.zeros([BLOCK], tl.float32))
        tl.store(attention + token, weight, mask=token < tokens)
