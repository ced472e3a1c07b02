"""The modules by their formulas, one item and one token at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.compiler.toys import Toy

Array = NDArray[np.float64]
Tensors = Mapping[str, Array]


def normed(row: Array, scale: Array, shift: Array) -> Array:
    centred = row - row.mean()
    result: Array = centred / math.sqrt(float((centred**2).mean()) + 1e-5) * scale + shift
    return result


def gelu(row: Array) -> Array:
    return np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in row])


def softmax(column: Array) -> Array:
    powers = np.exp(column - column.max())
    result: Array = powers / powers.sum()
    return result


def slimmed(tokens: Array, w: Tensors) -> Array:
    """SiT: the tokens ``[n, C]`` behind the prefix become ``[M, C]``."""
    logits = []
    for token in tokens:
        row = normed(token, w["norm_scale"], w["norm_shift"])
        hidden = gelu(w["first"] @ row + w["first_bias"])
        logits.append(w["sharpness"] * (w["second"] @ hidden + w["second_bias"]))
    shares = np.stack([softmax(column) for column in np.array(logits).T])
    result: Array = shares @ tokens
    return result


def merged(tokens: Array, w: Tensors) -> Array:
    """PatchMerger, likewise."""
    rows = np.stack([normed(token, w["scale"], w["shift"]) for token in tokens])
    result: Array = np.stack([softmax(rows @ query) for query in w["queries"]]) @ rows
    return result


def chances(tokens: Array, w: Tensors) -> Array:
    """DynamicViT: log-chance that each of the tokens ``[n, C]`` behind the prefix stays."""
    hidden = np.stack(
        [
            gelu(w["first"] @ normed(t, w["norm_scale"], w["norm_shift"]) + w["first_bias"])
            for t in tokens
        ]
    )
    half = hidden.shape[1] // 2
    everywhere = hidden[:, half:].mean(0)
    found = []
    for row in hidden:
        both = np.concatenate([row[:half], everywhere])
        both = gelu(w["second"] @ both + w["second_bias"])
        both = gelu(w["third"] @ both + w["third_bias"])
        stay, go = w["last"] @ both + w["last_bias"]
        found.append(stay - np.logaddexp(stay, go))
    return np.array(found)


MEANS: dict[str, Callable[[Array, Tensors], Array]] = {"sit": slimmed, "patch-merger": merged}


def between(model: Toy, x: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """What a toy answers when ``change(layer, tokens [B, N, C])`` stands behind each of its blocks."""
    with torch.no_grad():
        if model.pool == "class":
            x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        for layer, block in enumerate(model.blocks):
            x = change(layer, block(x))
        x = model.norm(x)
        answers: Tensor = model.head(x[:, 0] if model.pool == "class" else x.mean(1))
    return answers
