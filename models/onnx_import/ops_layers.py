"""Layers: products, convolutions, normalisations, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from thresher.models.onnx_import.node import Call, Result, op

LINEAR = "raised::Linear"


@op("MatMul")
def matmul(call: Call) -> torch.Tensor:
    return torch.matmul(call.tensor(0), call.tensor(1))


@op(LINEAR)
def linear(call: Call) -> torch.Tensor:
    """``x @ weight.T + bias``, made by :mod:`raise_layers`."""
    return F.linear(call.tensor(0), call.tensor(1), call.maybe(2))


@op("com.microsoft::FusedMatMul")
def fused_matmul(call: Call) -> torch.Tensor:
    a, b = call.tensor(0), call.tensor(1)
    if call.integer("transBatchA") or call.integer("transBatchB"):
        raise ValueError("transBatchA and transBatchB are not supported")
    a = a.transpose(-1, -2) if call.integer("transA") else a
    b = b.transpose(-1, -2) if call.integer("transB") else b
    alpha = call.number("alpha", 1.0)
    return torch.matmul(a, b) if alpha == 1.0 else torch.matmul(a, b) * alpha


@op("Gemm")
def gemm(call: Call) -> torch.Tensor:
    a, b, c = call.tensor(0), call.tensor(1), call.maybe(2)
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    a = a.t() if call.integer("transA") else a
    weight = b if call.integer("transB") else b.t()
    if c is not None and alpha == beta == 1.0 and c.dim() == 1:
        return F.linear(a, weight, c)
    product = F.linear(a, weight)
    product = product if alpha == 1.0 else product * alpha
    return product if c is None else product + (c if beta == 1.0 else c * beta)


@op("Einsum")
def einsum(call: Call) -> torch.Tensor:
    return torch.einsum(call.text("equation"), *call.tensors())


def _window(call: Call, x: torch.Tensor, kernel: Sequence[int]) -> tuple[list[int], ...]:
    """Strides, dilations, padding before and after each spatial axis."""
    rank = len(kernel)
    strides = call.listed("strides") or [1] * rank
    dilations = call.listed("dilations") or [1] * rank
    pads = list(call.listed("pads") or [0] * (2 * rank))
    auto = call.text("auto_pad", "NOTSET")
    before, after = pads[:rank], pads[rank:]
    if auto.startswith("SAME"):
        for i in range(rank):
            size = x.shape[i + 2]
            reach = (kernel[i] - 1) * dilations[i] + 1
            need = torch.sym_max((-(-size // strides[i]) - 1) * strides[i] + reach - size, 0)
            small, large = need // 2, need - need // 2
            before[i], after[i] = (small, large) if auto == "SAME_UPPER" else (large, small)
    return strides, dilations, before, after


def _padded(x: torch.Tensor, before: list[int], after: list[int], value: float) -> torch.Tensor:
    flat = [n for i in reversed(range(len(before))) for n in (before[i], after[i])]
    return F.pad(x, flat, value=value)


@op("Conv")
def convolution(call: Call) -> torch.Tensor:
    x, weight, bias = call.tensor(0), call.tensor(1), call.maybe(2)
    strides, dilations, before, after = _window(call, x, weight.shape[2:])
    if before != after:
        x, before = _padded(x, before, after, 0.0), [0] * len(before)
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    result: torch.Tensor = function(
        x, weight, bias, strides, before, dilations, call.integer("group", 1)
    )
    return result


@op("ConvTranspose")
def transposed_convolution(call: Call) -> torch.Tensor:
    x, weight, bias = call.tensor(0), call.tensor(1), call.maybe(2)
    strides, dilations, before, after = _window(call, x, weight.shape[2:])
    extra = list(call.listed("output_padding") or [0] * len(strides))
    placed = call.listed("output_shape") or call.text("auto_pad", "NOTSET") != "NOTSET"
    if before != after or placed:
        raise ValueError("uneven padding, auto_pad and output_shape are not supported")
    kinds = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    function: Any = kinds[weight.dim() - 3]
    group = call.integer("group", 1)
    result: torch.Tensor = function(x, weight, bias, strides, before, extra, group, dilations)
    return result


@op("AveragePool", "MaxPool")
def pool(call: Call) -> torch.Tensor:
    x, kernel = call.tensor(0), call.listed("kernel_shape") or []
    strides, dilations, before, after = _window(call, x, kernel)
    rank, ceil = len(kernel), bool(call.integer("ceil_mode"))
    uneven = before != after
    if call.node.op == "MaxPool":
        if len(call.node.outputs) > 1:
            raise ValueError("the indices of MaxPool are not supported")
        if uneven:
            x, before = _padded(x, before, after, float("-inf")), [0] * rank
        function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        highest: torch.Tensor = function(x, kernel, strides, before, dilations, ceil)
        return highest
    counted = bool(call.integer("count_include_pad"))
    if uneven and not counted:
        raise ValueError("uneven padding that is not counted is not supported")
    if (ceil and any(before + after)) or any(step != 1 for step in dilations):
        raise ValueError("AveragePool with dilations, or with padding and ceil_mode=1")
    if uneven:
        x, before = _padded(x, before, after, 0.0), [0] * rank
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    mean: torch.Tensor = function(x, kernel, strides, before, ceil, counted)
    return mean


@op("GlobalAveragePool", "GlobalMaxPool")
def global_pool(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    axes = list(range(2, x.dim()))
    if call.node.op == "GlobalMaxPool":
        return torch.amax(x, axes, keepdim=True)
    return torch.mean(x, axes, keepdim=True)


@op("BatchNormalization")
def batch_normalization(call: Call) -> torch.Tensor:
    if call.integer("training_mode"):
        raise ValueError("BatchNormalization in training mode is not supported")
    x, weight, bias, mean, variance = call.tensors()
    return F.batch_norm(x, mean, variance, weight, bias, eps=call.number("epsilon", 1e-5))


@op("LayerNormalization", "com.microsoft::LayerNormalization")
def layer_normalization(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    shape = x.shape[call.integer("axis", -1) % x.dim() :]
    weight, bias = (t if t is None else t.expand(shape) if t.shape != shape else t
                    for t in (call.maybe(1), call.maybe(2)))  # fmt: skip
    return F.layer_norm(x, shape, weight, bias, call.number("epsilon", 1e-5))


@op("com.microsoft::SkipLayerNormalization")
def skip_layer_normalization(call: Call) -> Result:
    """Inputs: x, skip, gamma, beta, bias; the fourth output is the sum before the norm."""
    total = call.tensor(0) + call.tensor(1)
    if call.has(4):
        total = total + call.tensor(4)
    shape, eps = total.shape[-1:], call.number("epsilon", 1e-12)
    normal = F.layer_norm(total, shape, call.tensor(2), call.maybe(3), eps)
    unused = torch.zeros((), dtype=total.dtype)
    return [normal, unused, unused, total][: max(len(call.node.outputs), 1)]


@op("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    shape = list(x.shape[call.integer("axis", -1) % x.dim() :])
    return F.rms_norm(x, shape, call.tensor(1), call.number("epsilon", 1e-5))


@op("InstanceNormalization")
def instance_normalization(call: Call) -> torch.Tensor:
    x, weight, bias = call.tensors()
    return F.instance_norm(x, weight=weight, bias=bias, eps=call.number("epsilon", 1e-5))


@op("GroupNormalization")
def group_normalization(call: Call) -> torch.Tensor:
    x, weight, bias = call.tensors()
    groups = call.integer("num_groups")
    if call.node.opset < 21:  # one value per group
        weight, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (weight, bias))
    return F.group_norm(x, groups, weight, bias, call.number("epsilon", 1e-5))
