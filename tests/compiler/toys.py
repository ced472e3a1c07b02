"""Smallest transformers that show one trait each, traced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace

WIDTH, HEADS, TOKENS = 16, 2, 9


class Block(nn.Module):
    """Pre-norm block; ``mixer`` puts something between attention and the next block."""

    def __init__(self, *, causal: bool = False, mixer: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.causal, self.mixer = causal, mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, WIDTH))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        mixed: torch.Tensor = x if self.mixer is None else self.mixer(x)
        return mixed


class TokenConv(nn.Module):
    """A convolution over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.conv(x.transpose(1, 2))
        return x + mixed.transpose(1, 2)


class Toy(nn.Module):
    """Two or more blocks behind a class token; ``pool`` says what is read out."""

    def __init__(self, *blocks: Block, pool: str = "class", skip: bool = False) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(blocks or (Block(), Block()))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.pool, self.skip = pool, skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool in ("class", "dense"):
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        early = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 0:
                early = x
        if self.skip:
            x = x + early
        x = self.norm(x)
        if self.pool == "dense":
            dense: torch.Tensor = self.head(x)
            return dense
        if self.pool == "sequence":
            read: torch.Tensor = self.head((x[..., :1].softmax(dim=1) * x).sum(dim=1))
            return read
        logits: torch.Tensor = self.head(x[:, 0] if self.pool == "class" else x.mean(dim=1))
        return logits


def traced(model: nn.Module, tokens: int = TOKENS, *, dynamic: bool = False) -> Program:
    """Trace a toy on ``[B, tokens, WIDTH]``."""
    torch.manual_seed(0)
    axes = {0: "batch", 1: "tokens"} if dynamic else {0: "batch"}
    return trace(
        model, {"x": torch.randn(2, tokens, WIDTH)}, dynamic={"x": axes}, info=SourceInfo("toy")
    )
