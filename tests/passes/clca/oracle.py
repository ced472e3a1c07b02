"""Cache, head and what carries them, by their text: one item at a time, in float64, with lists of tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tests.compiler.toys import HEADS, WIDTH, Block, Toy
from tests.kernels import oracle as steps
from tests.passes.modules.oracle import gelu, normed, softmax

Array = NDArray[np.float64]
Tensors = Mapping[str, Array]
DEPTH = WIDTH // HEADS


@dataclass(frozen=True)
class Host:
    """A token reduction: its step, and how many tokens it leaves, by block."""

    name: str
    left: Mapping[int, int]

    def reduce(self, layer: int, x: Array, size: Array, q: Array, k: Array) -> tuple[Array, Array]:
        """Tokens ``[n, C]`` and sizes ``[n]`` that leave; ``q``, ``k``: ``[H, n, d]``."""
        keep = self.left[layer]
        if self.name == "tome":
            merged = steps.bipartite_merge(x[None], size[None], k[None], keep, 1, True)
            return merged.y[0], merged.out_size[0]
        if self.name == "evit":
            score = steps.class_attention(q[None], k[None], None, DEPTH**-0.5, 0)
        else:
            score = np.sqrt((x**2).sum(1))[None].astype(np.float32)
        y, _, _ = steps.keep_tokens(x[None], score, keep, 1, self.name == "evit")
        return y[0], np.ones(keep)


def arrays(module: torch.nn.Module) -> dict[str, Array]:
    return {n: p.detach().double().numpy() for n, p in module.named_parameters()}


def attended(block: Block, x: Array, size: Array) -> tuple[Array, Array, Array]:
    """Tokens behind the attention of a block, its queries and its keys."""
    w = arrays(block)
    rows = np.stack([normed(t, w["norm1.weight"], w["norm1.bias"]) for t in x])
    qkv = rows @ w["qkv.weight"].T + w["qkv.bias"]
    q, k, v = (
        part.reshape(len(x), HEADS, DEPTH).swapaxes(0, 1) for part in np.split(qkv, 3, axis=1)
    )
    heads = []
    for h in range(HEADS):
        logits = q[h] @ k[h].T / math.sqrt(DEPTH) + np.log(size)
        heads.append(np.stack([softmax(row) for row in logits]) @ v[h])
    mixed = np.concatenate(heads, axis=1)
    return x + mixed @ w["proj.weight"].T + w["proj.bias"], q, k


def fed_forward(block: Block, x: Array) -> Array:
    w = arrays(block)
    out = []
    for token in x:
        row = w["fc1.weight"] @ normed(token, w["norm2.weight"], w["norm2.bias"]) + w["fc1.bias"]
        out.append(token + w["fc2.weight"] @ gelu(row) + w["fc2.bias"])
    return np.stack(out)


def class_tokens(model: Toy, patches: Array, host: Host, token: Array | None) -> Array:
    """``[C, S]``: the class token behind each block at which tokens leave, and behind the last."""
    depth = len(model.blocks)
    start = [model.cls_token.detach().double().numpy()[0, 0], *patches]
    own = len(start)
    x = np.stack([*start, token] if token is not None else start)
    size = np.ones(len(x))
    recovers = {*host.left, depth - 2} - {depth - 1}
    cache: list[Array] = []
    seen = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        x, q, k = attended(block, x, size)
        if layer in host.left:
            x, size = host.reduce(layer, x, size, q, k)
        x = fed_forward(block, x)
        if layer in host.left or layer == depth - 1:
            seen.append(x[0])
        if token is None:
            continue
        if layer in recovers:
            own = len(x)
            x = np.concatenate([x, *(carrier[None] for carrier in cache)])
            size = np.concatenate([size, np.ones(len(cache))])
            cache = []
        if layer < max(recovers):
            cache += [np.mean(x[1:own], axis=0), x[-1]]
    return np.stack(seen, axis=1)


def head(stacked: Array, w: Tensors, stats: Tensors) -> Array:
    """Batch norm, depthwise convolution over all places, batch norm, GELU, read-out; each with its own formula."""
    mixed = []
    for c, row in enumerate(stacked):
        y = (row - stats["mean"][c]) / math.sqrt(stats["var"][c] + 1e-5) * w["scale"][c] + w[
            "shift"
        ][c]
        for o in (2 * c, 2 * c + 1):
            z = sum(w["mix"][o, s] * y[s] for s in range(len(y))) + w["mix_bias"][o]
            z = (z - stats["mixed_mean"][o]) / math.sqrt(stats["mixed_var"][o] + 1e-5)
            mixed.append(z * w["mixed_scale"][o] + w["mixed_shift"][o])
    result: Array = w["read"] @ gelu(np.array(mixed)) + w["read_bias"]
    return result


def answers(
    model: Toy, x: torch.Tensor, host: Host, w: Tensors, stats: Tensors, token: Array | None
) -> Array:
    """``[B, K]``."""
    return np.stack(
        [head(class_tokens(model, item, host, token), w, stats) for item in x.double().numpy()]
    )


def extra(depth: int, reduced: Collection[int]) -> Sequence[tuple[int, int]]:
    """Behind which block how many tokens are appended, by the text: two for each block since the last time."""
    recovers = sorted({*reduced, depth - 2} - {depth - 1})
    found, since = [(-1, 1)], 0
    for block in range(depth):
        if block in recovers and since:
            found.append((block, 2 * since))
            since = 0
        since += block < recovers[-1]
    return found
