"""Token merging written plainly in eager PyTorch: what one would write without thresher.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, sections 3 and 4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def merge(x: Tensor, size: Tensor, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge ``r`` pairs: tokens ``[B, N, C]`` and sizes ``[B, N, 1]`` become ``N - r``.

    ``keys [B, N, d]`` say which tokens are alike.  Even positions, the class token first among
    them, are sources; odd ones are destinations.
    """
    keys = F.normalize(keys, dim=-1)
    alike = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    alike[:, 0] = -torch.inf  # the class token merges into nothing
    best, destination = alike.max(-1)
    order = best.argsort(dim=-1, descending=True)
    going, staying = order[:, :r], order[:, r:].sort(-1).values
    into = destination.gather(1, going)

    def joined(values: Tensor) -> Tensor:
        width = values.shape[-1]
        source, target = values[:, ::2], values[:, 1::2]
        gone = source.gather(1, going.unsqueeze(-1).expand(-1, -1, width))
        stay = source.gather(1, staying.unsqueeze(-1).expand(-1, -1, width))
        return torch.cat(
            [stay, target.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, width), gone)], 1
        )

    total = joined(size)
    return joined(x * size) / total, total


class PlainTome(nn.Module):
    """A timm vision transformer that merges ``r`` tokens between attention and MLP of each block."""

    def __init__(self, model: Any, r: int) -> None:
        super().__init__()
        self.model = model
        self.r = r

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        size = torch.ones_like(x[..., :1])
        for block in model.blocks:
            attended, keys = _attend(block.attn, block.norm1(x), size)
            x, size = merge(x + block.ls1(attended), size, keys, self.r)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        logits: Tensor = model.forward_head(model.norm(x))
        return logits


def _attend(attention: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in which a token counts as often as its size; also the mean keys ``[B, N, d]``."""
    batch, tokens, width = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, tokens, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = size.log().squeeze(-1)[:, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(mixed.transpose(1, 2).reshape(batch, tokens, width)), k.mean(1)
