"""The aggregation head: class tokens of several blocks, stacked, normed, mixed channel by channel, read out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EPSILON = 1e-5  # of both norms
PER_CHANNEL = 2  # mixtures of each channel
RIDGE = 1e-2  # added to variances of 1 where the read-out is fitted

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def learned(width: int, tokens: int, classes: int) -> Shapes:
    """What is trained: scale and shift of both norms, the depthwise kernel, the read-out."""
    mixed = PER_CHANNEL * width
    return {
        "scale": (width,), "shift": (width,),
        "mix": (mixed, tokens), "mix_bias": (mixed,),
        "mixed_scale": (mixed,), "mixed_shift": (mixed,),
        "read": (classes, mixed), "read_bias": (classes,),
    }  # fmt: skip


def folded_shapes(width: int, tokens: int, classes: int) -> Shapes:
    """What the graph holds: a norm in front of a convolution and one behind it are part of the convolution."""
    mixed = PER_CHANNEL * width
    return {
        "kernel": (mixed, 1, tokens), "bias": (mixed,), "read": (classes, mixed), "read_bias": (classes,),
    }  # fmt: skip


def initial(stacked: Tensor, dense: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A head that begins as a linear read-out of the last class token, and the statistics of its norms.

    The two mixtures of a channel begin as ``z`` and ``-z``, the last class token with mean 0 and variance 1.
    As ``gelu(z) - gelu(-z) = z``, any linear function of it is within reach of the read-out; it begins as the
    ridge regression of the dense model's logits.

    Args:
        stacked: ``[n, C, S]`` class tokens of the reduced model.
        dense: ``[n, K]`` logits of the dense one.

    Returns:
        the tensors of :func:`learned`, and ``mean``, ``var`` ``[C]``, ``mixed_mean``, ``mixed_var`` ``[2 C]``.
    """
    stacked, dense = stacked.double(), dense.double()
    width, tokens, classes = stacked.shape[1], stacked.shape[2], dense.shape[1]
    found = {name: torch.zeros(s, dtype=torch.float64) for name, s in
             learned(width, tokens, classes).items()}  # fmt: skip
    found["scale"] += 1
    found["mixed_scale"] += 1
    found["mix"][0::PER_CHANNEL, -1] = 1
    found["mix"][1::PER_CHANNEL, -1] = -1
    over = (0, 2)
    stats = {"mean": stacked.mean(over), "var": stacked.var(over, correction=0)}
    normed = (stacked - stats["mean"][:, None]) / (stats["var"][:, None] + EPSILON).sqrt()
    mixed = torch.einsum("bcs,cps->bcp", normed, found["mix"].view(width, PER_CHANNEL, tokens))
    mixed = mixed.flatten(1)
    stats |= {"mixed_mean": mixed.mean(0), "mixed_var": mixed.var(0, correction=0)}
    z = (mixed - stats["mixed_mean"]) / (stats["mixed_var"] + EPSILON).sqrt()
    z = z[:, 0::PER_CHANNEL]
    mean = dense.mean(0)
    gram = z.T @ z / len(z) + RIDGE * torch.eye(width, dtype=torch.float64)
    linear = torch.linalg.solve(gram, z.T @ (dense - mean) / len(z)).T
    found["read"][:, 0::PER_CHANNEL], found["read"][:, 1::PER_CHANNEL] = linear, -linear
    found["read_bias"] = mean
    return _single(found), _single(stats)


def folded(head: Tensors, stats: Tensors) -> dict[str, Tensor]:
    """The tensors of the graph, differentiable in those that are trained.

    ``batch norm -> depthwise convolution -> batch norm`` with fixed statistics is one depthwise convolution.
    """
    first = head["scale"] / (stats["var"] + EPSILON).sqrt()
    shift = head["shift"] - stats["mean"] * first
    second = head["mixed_scale"] / (stats["mixed_var"] + EPSILON).sqrt()
    kernel = head["mix"] * first.repeat_interleave(PER_CHANNEL)[:, None]
    bias = head["mix_bias"] + head["mix"].sum(1) * shift.repeat_interleave(PER_CHANNEL)
    return {
        "kernel": (kernel * second[:, None])[:, None, :],
        "bias": (bias - stats["mixed_mean"]) * second + head["mixed_shift"],
        "read": head["read"],
        "read_bias": head["read_bias"],
    }


def _single(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}
