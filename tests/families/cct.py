"""A compact transformer: convolutional tokenizer, no class token, sequence pooling.

Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .entry import Dynamic, Entry, images

SIDE, WIDTH, HEADS, LAYERS = 24, 32, 2, 4
_IMAGE: Dynamic = {"x": {0: "batch"}}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        hidden: Tensor = self.down(functional.gelu(self.up(self.second_norm(x))))
        return x + hidden


class CompactTransformer(nn.Module):
    """Logits under the keyword ``x``: 36 tokens of images of 24 x 24 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(16, WIDTH, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // 4) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.pool = nn.Linear(WIDTH, 1)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.tokenizer(x).flatten(2).transpose(1, 2) + self.pos_embed
        x = self.norm(self.blocks(x))
        shares = self.pool(x).softmax(dim=1)
        return {"logits": self.head((shares.transpose(1, 2) @ x).squeeze(1))}


COMPACT = Entry(
    name="compact:cct",
    make=CompactTransformer,
    inputs=images(SIDE, "x"),
    layers=LAYERS,
    pooling="sequence",
    dynamic=_IMAGE,
)
