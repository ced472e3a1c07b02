"""The search forward of DiffRate on a toy, token by token in float64, from the paper's text."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler.toys import HEADS, WIDTH, Block, Toy

Site = tuple[int, int, list[float]]  # kept by pruning, kept by merging, mask by rank


def logits(model: Toy, x: Tensor, sites: dict[int, Site], prefix: int) -> Tensor:
    """``[B, classes]`` for ``x`` ``[B, tokens, WIDTH]``."""
    return torch.stack([_item(model, one, sites, prefix) for one in x])


def _item(model: Toy, x: Tensor, sites: dict[int, Site], prefix: int) -> Tensor:
    tokens = [*([model.cls_token[0, 0]] if prefix else []), *x]
    alive = [1.0] * len(tokens)
    size = [1.0] * len(tokens)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        mixed, score = _attention(block, tokens, alive, size, prefix)
        tokens = [t + block.proj(m) for t, m in zip(tokens, mixed, strict=True)]
        if layer in sites:
            tokens, alive, size = _reduce(tokens, alive, size, score, prefix, sites[layer])
        tokens = [t + block.fc2(F.gelu(block.fc1(block.norm2(t)))) for t in tokens]
    if prefix:
        out: Tensor = model.head(model.norm(tokens[0]))
        return out
    weights = [a * s for a, s in zip(alive, size, strict=True)]
    if model.pool == "sequence":
        worth = [math.exp(float(model.norm(t)[0])) for t in tokens]
        weights = [w * e for w, e in zip(weights, worth, strict=True)]
    pooled = sum(model.norm(t) * w for t, w in zip(tokens, weights, strict=True))
    out = model.head(pooled / sum(weights))
    return out


def _attention(
    block: Block, tokens: list[Tensor], alive: list[float], size: list[float], prefix: int
) -> tuple[list[Tensor], list[float]]:
    width = WIDTH // HEADS
    mixed = [torch.zeros(WIDTH, dtype=torch.float64) for _ in tokens]
    score = [0.0] * len(tokens)
    parts = [block.qkv(block.norm1(t)) for t in tokens]
    for head in range(HEADS):
        q, k, v = (
            [p[n * WIDTH + head * width : n * WIDTH + (head + 1) * width] for p in parts]
            for n in range(3)
        )
        for i in range(len(tokens)):
            seen = [
                math.exp(float(q[i] @ k[j]) / math.sqrt(width))
                * max(size[j], 1.0)
                * (1.0 if i == j else float(alive[j]))
                for j in range(len(tokens))
            ]
            share = [s / sum(seen) for s in seen]
            for j, part in enumerate(share):
                mixed[i][head * width : (head + 1) * width] += part * v[j]
                if prefix and i == 0:
                    score[j] += part / HEADS
                if not prefix:
                    score[j] += part * float(alive[i]) / (HEADS * sum(map(float, alive)))
    return mixed, score


def _reduce(
    tokens: list[Tensor],
    alive: list[float],
    size: list[float],
    score: list[float],
    prefix: int,
    site: Site,
) -> tuple[list[Tensor], list[float], list[float]]:
    pruned, kept, mask = site
    order = sorted(
        range(prefix, len(tokens)), key=lambda i: (-(score[i] if alive[i] > 0 else -1.0), i)
    )
    stay, join = order[:kept], [i for i in order[kept:pruned] if alive[i] > 0]
    groups: dict[int, list[tuple[int, float]]] = {i: [] for i in stay}
    for i in join:
        cosines = [
            float(F.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in range(len(tokens))
        ]
        best = max(sorted(stay), key=lambda j: cosines[j])
        groups[best].append((i, cosines[best]))
    new, sizes = list(tokens), list(size)
    for j, members in groups.items():
        if members:
            new[j] = (tokens[j] + sum(tokens[i] for i, _ in members)) / (1 + len(members))
            sizes[j] = size[j] + sum(cosine * size[i] for i, cosine in members)
    sizes = [max(1.0, s) for s in sizes]
    left = list(alive)
    for rank, i in enumerate(order):
        left[i] = alive[i] * mask[rank]
    return new, left, sizes
