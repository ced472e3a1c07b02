"""Really shortened BERT and ModernBERT under ToMe, with padding: the second oracle for text.

Padding is size 0, so its log size hides it from attention without any further mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .shorten import State, merge_step


def shortened_bert(
    model: Any, ids: Tensor, mask: Tensor, counts: Sequence[int], prefix: int
) -> tuple[Tensor, list[State]]:
    """Last hidden state [B, N, C] of a Hugging Face BertModel (post-norm), every token restored."""
    state, states = State.start(model.embeddings(ids), mask.double()), []
    heads = model.config.num_attention_heads
    for layer, target in zip(model.encoder.layer, counts, strict=True):
        own, out = layer.attention.self, layer.attention.output
        q, k, v = (_split(part(state.x), heads) for part in (own.query, own.key, own.value))
        mixed = _mix(q, k, v, state.size.log()[:, None, None, :])
        state = replace(state, x=out.LayerNorm(out.dense(mixed) + state.x))
        state = merge_step(state, k.mean(dim=1), state.x.shape[1] - target, prefix)
        hidden = functional.gelu(layer.intermediate.dense(state.x))
        hidden = layer.output.dense(hidden) + state.x
        state = replace(state, x=layer.output.LayerNorm(hidden))
        states.append(state)
    return _restored(state), states


def shortened_modernbert(
    model: Any, ids: Tensor, mask: Tensor, counts: Sequence[int], prefix: int
) -> tuple[Tensor, list[State]]:
    """Last hidden state of a Hugging Face ModernBertModel (RoPE, sliding windows), restored."""
    state, states = State.start(model.embeddings(ids), mask.double()), []
    heads = model.config.num_attention_heads
    for layer, target in zip(model.layers, counts, strict=True):
        parts = layer.attn.Wqkv(layer.attn_norm(state.x)).chunk(3, dim=-1)
        q, k, v = (_split(part, heads) for part in parts)
        cos, sin = model.rotary_emb(state.x, state.place, layer.attention_type)
        q, k = (t * cos[:, None] + _turned(t) * sin[:, None] for t in (q, k))
        bias = state.size.log()[:, None, None, :]
        if layer.attention_type == "sliding_attention":
            distance = (state.place[:, :, None] - state.place[:, None, :]).abs()
            far = distance > model.config.sliding_window
            bias = bias + torch.zeros(far.shape).double().masked_fill(far, -torch.inf)[:, None]
        state = replace(state, x=state.x + layer.attn.Wo(_mix(q, k, v, bias)))
        state = merge_step(state, k.mean(dim=1), state.x.shape[1] - target, prefix)
        inner, gate = layer.mlp.Wi(layer.mlp_norm(state.x)).chunk(2, dim=-1)
        state = replace(state, x=state.x + layer.mlp.Wo(functional.gelu(inner) * gate))
        states.append(state)
    return _restored(replace(state, x=model.final_norm(state.x))), states


def _split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def _mix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(dim=-1)
    # padding far from every real token sees no key at all
    mixed: Tensor = weights.nan_to_num(0.0) @ v
    return mixed.transpose(1, 2).flatten(-2)


def _restored(state: State) -> Tensor:
    return state.x.gather(1, state.slot[..., None].expand(-1, -1, state.x.shape[-1]))
