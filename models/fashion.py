"""The vision transformer that thresher ships: small, trained on Fashion-MNIST, 197 tokens.

A plain pre-norm ViT (Dosovitskiy et al., 2021) with a class token and a three-layer
convolutional stem, which learns faster than a patch embedding on small data (Xiao et al.,
"Early convolutions help transformers see better", 2021).  It makes the demo and the accuracy
tests work on any machine with nothing further to download; ``train_fashion.py`` trains it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from thresher.models.spec import ModelSpec

FOLDER = Path(__file__).parent / "fashion_mnist"
WEIGHTS = FOLDER / "vit.safetensors"
TEST_SET = FOLDER / "test.npz"
CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images scaled to [0, 1]


class Attention(nn.Module):
    """Multi-head self-attention over ``[B, N, D]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        mixed: torch.Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return mixed


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = x + self.attn(self.norm1(x))
        mixed: torch.Tensor = attended + self.mlp(self.norm2(attended))
        return mixed


class FashionViT(nn.Module):
    """Logits ``[B, 10]`` of normalised grey images ``[B, 1, 28, 28]``.

    The stem halves the side once: a 14x14 grid, 196 patch tokens and one class token.
    """

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 4),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, padding=1),
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + 14 * 14, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, 1, 28, 28] -> [B, 197, D]``: class token, then the grid row by row."""
        grid = self.stem(images).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(grid.shape[0], -1, -1)
        return torch.cat([cls, grid], dim=1) + self.pos_embed

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[B, N, D] -> [B, 10]``, for any N."""
        logits: torch.Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(self.embed(images))


def vit() -> FashionViT:
    """The trained network in evaluation mode, with what thresher wants to know about it."""
    from safetensors.torch import load_file

    model = FashionViT()
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    model.thresher_spec = ModelSpec(  # type: ignore[assignment]
        example={"images": torch.zeros(2, 1, 28, 28)},
        dynamic={"images": {0: "batch"}},
        outputs=("logits",),
        preprocessing={
            "kind": "image",
            "input": "images",
            "size": [28, 28],
            "channels": 1,
            "mean": [MEAN],
            "std": [STD],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        labels=CLASSES,
        weights=WEIGHTS,
        licence="Apache-2.0 (trained on Fashion-MNIST, MIT)",
    )
    return model.eval()
