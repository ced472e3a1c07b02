"""Attention and rotary embedding: the operators of opset 23, and attention raised from pieces."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from thresher.models.onnx_import.node import Call, Result, op

ATTENTION = "raised::Attention"


@op(ATTENTION)
def raised_attention(call: Call) -> torch.Tensor:
    """Made by :mod:`raise_attention`: query, key, value ``[..., N, d]`` and an additive mask."""
    q, k, v, mask = call.tensor(0), call.tensor(1), call.tensor(2), call.maybe(3)
    if (
        q.dtype != v.dtype
    ):  # scores were cast up before the softmax, and the product was not cast back
        q, k = q.to(v.dtype), k.to(v.dtype)
    if mask is not None and mask.dtype not in (q.dtype, torch.bool):
        mask = mask.to(q.dtype)
    return _attend(q, k, v, mask, call.number("scale", 1.0))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """A scale that is the usual one is left to the default, as a traced model would."""
    width = q.shape[-1]
    usual = isinstance(width, int) and abs(scale * width**0.5 - 1.0) < 1e-5
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=None if usual else scale
    )


_OPTIONS = {"is_causal", "q_num_heads", "kv_num_heads", "scale", "softcap"}
_HARMLESS = {"softmax_precision", "qk_matmul_output_mode"}  # torch computes softmax in float32


@op("Attention")
def attention(call: Call) -> Result:
    other = call.node.attributes.keys() - _OPTIONS - _HARMLESS
    if other:
        raise ValueError(f"Attention with {', '.join(sorted(other))}")
    if call.has(4) or call.has(5) or call.has(6) or len(call.node.outputs) > 1:
        raise ValueError("Attention with a key-value cache or with its score output")
    if call.number("softcap"):
        raise ValueError("Attention with softcap")
    q, k, v, mask = call.tensor(0), call.tensor(1), call.tensor(2), call.maybe(3)
    flat = q.dim() == 3
    if flat:
        heads = call.integer("q_num_heads")
        pairs = call.integer("kv_num_heads", heads)
        q, k, v = (_heads(t, n) for t, n in ((q, heads), (k, pairs), (v, pairs)))
    groups = q.shape[1] // k.shape[1]
    if groups != 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    causal = bool(call.integer("is_causal"))
    if causal and mask is not None:
        lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        closed = torch.zeros_like(lower, dtype=q.dtype).masked_fill(~lower, float("-inf"))
        mask, causal = (mask & lower if mask.dtype == torch.bool else mask + closed), False
    scale = call.number("scale", q.shape[-1] ** -0.5)
    y = _attend(q, k, v, mask, scale, causal)
    return y.transpose(1, 2).flatten(2) if flat else y


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, N, H * d] -> [B, H, N, d]``."""
    return x.reshape(x.shape[0], x.shape[1], count, x.shape[2] // count).transpose(1, 2)


@op("RotaryEmbedding")
def rotary_embedding(call: Call) -> torch.Tensor:
    """x ``[B, H, N, d]`` or ``[B, N, H * d]``; cos and sin ``[B, N, r / 2]``, or tables."""
    x, cos, sin = call.tensor(0), call.tensor(1), call.tensor(2)
    if call.has(3):
        cos, sin = (F.embedding(call.tensor(3), table) for table in (cos, sin))
    flat = x.dim() == 3
    if flat:
        x = _heads(x, call.integer("num_heads"))
    width = call.integer("rotary_embedding_dim") or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if call.integer("interleaved"):
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    y = turned if width == x.shape[-1] else torch.cat((turned, rest), -1)
    return y.transpose(1, 2).flatten(2) if flat else y
