"""Learned tokens in order: a 1-D image tokenizer (suffix of the patches) and a resampler (queries).

Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", 2024 (TiTok); Hu et al.,
"Matryoshka Query Transformer for Large Vision-Language Models", 2024 (MQT).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .entry import Dynamic, Entry, images

SIDE, PATCH, WIDTH, HEADS, LAYERS = 24, 4, 32, 2, 3
LATENTS, CODE, CODES = 12, 6, 20
_IMAGE: Dynamic = {"x": {0: "batch"}}


class Block(nn.Module):
    """Pre-norm attention and MLP over tokens ``[N, B, C]``, as TiTok has them."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        hidden: Tensor = self.down(functional.gelu(self.up(self.ln_2(x))))
        return x + hidden


class Tokenizer(nn.Module):
    """Codes of images of 24 x 24 pixels: class token, 36 patches and 12 latents, which alone are read out.

    Outputs: ``z [B, D, 1, K]``, unit vectors, and ``codes [B, K]`` int64, the nearest of the codebook.
    """

    outputs = ("z", "codes")

    def __init__(self, latents: int = LATENTS) -> None:
        super().__init__()
        patches = (SIDE // PATCH) ** 2
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, WIDTH))
        self.latent_tokens = nn.Parameter(torch.zeros(latents, WIDTH))
        self.latent_pos_embed = nn.Parameter(torch.zeros(latents, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.conv_out = nn.Conv2d(WIDTH, CODE, 1)
        self.codebook = nn.Embedding(CODES, CODE)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        latents = self.latent_tokens.unsqueeze(0).expand(x.shape[0], -1, -1)
        patches = x.shape[1]
        x = self.ln_pre(torch.cat([x, latents + self.latent_pos_embed], dim=1))
        x = self.blocks(x.permute(1, 0, 2)).permute(1, 0, 2)[:, patches:]
        x = self.ln_post(x)
        batch, count, _ = x.shape
        z = self.conv_out(x.reshape(batch, count, WIDTH, 1).permute(0, 2, 1, 3))
        z = functional.normalize(z.reshape(batch, CODE, 1, count), dim=1)
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        book = functional.normalize(self.codebook.weight, dim=-1)
        codes = (flat @ book.T).argmax(dim=1).view(batch, count)
        return {"z": z, "codes": codes}


class Resampler(nn.Module):
    """Image features ``[B, 36, C]`` summed up by 12 queries in one cross-attention, ``[B, K, C]``."""

    outputs = ("tokens",)

    def __init__(self, latents: int = LATENTS) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.latent_queries = nn.Parameter(torch.zeros(1, latents, WIDTH))
        self.register_buffer("query_pos", _sines(latents))
        self.register_buffer("key_pos", _sines((SIDE // PATCH) ** 2))
        self.ln_q, self.ln_kv, self.ln_out = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.projection = nn.Linear(WIDTH, 2 * WIDTH)
        self.weighted = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.ln_kv(self.patch_embed(x).flatten(2).transpose(1, 2))
        queries = self.ln_q(self.latent_queries).repeat(x.shape[0], 1, 1) + self.query_pos
        keys = features + self.key_pos
        mixed, _ = self.attn(queries, keys, features, need_weights=self.weighted)
        return {"tokens": self.projection(self.ln_out(queries + mixed))}


def _sines(rows: int) -> Tensor:
    angles = torch.arange(rows)[:, None] / 100 ** (torch.arange(0, WIDTH, 2) / WIDTH)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


TOKENIZER = Entry(
    name="latents:tokenizer",
    make=Tokenizer,
    inputs=images(SIDE, "x"),
    layers=0,
    dynamic=_IMAGE,
    refused="latents are appended to the patches",
)
RESAMPLER = Entry(
    name="latents:resampler",
    make=Resampler,
    inputs=images(SIDE, "x"),
    layers=0,
    dynamic=_IMAGE,
    refused="queries of a cross-attention are all there is",
)
LATENT: tuple[Entry, ...] = (TOKENIZER, RESAMPLER)
