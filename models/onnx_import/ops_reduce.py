"""Reductions, softmax, sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch

from thresher.models.onnx_import.node import HANDLERS, Call, Handler, op

_Reduce = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, _Reduce] = {
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: torch.sum(x, axes, keepdim=keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: torch.sum(torch.abs(x), axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keepdim=keep)),
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(torch.sum(x, axes, keepdim=keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


def _reduction(function: _Reduce) -> Handler:
    def handler(call: Call) -> torch.Tensor:
        x, axes = call.tensor(0), call.axes()
        if not axes and call.integer("noop_with_empty_axes"):
            return x
        return function(x, list(axes or range(x.dim())), bool(call.integer("keepdims", 1)))

    return handler


HANDLERS.update({name: _reduction(function) for name, function in _REDUCTIONS.items()})


@op("ArgMax", "ArgMin")
def arg(call: Call) -> torch.Tensor:
    if call.integer("select_last_index"):
        raise ValueError("select_last_index=1 is not supported")
    function = torch.argmax if call.node.op == "ArgMax" else torch.argmin
    keep = bool(call.integer("keepdims", 1))
    return function(call.tensor(0), call.integer("axis"), keepdim=keep)


@op("Softmax", "LogSoftmax")
def softmax(call: Call) -> torch.Tensor:
    function = torch.softmax if call.node.op == "Softmax" else torch.log_softmax
    x = call.tensor(0)
    if call.node.opset >= 13:
        return function(x, call.integer("axis", -1))
    # before opset 13: over all axes from `axis` on, as one
    axis = call.integer("axis", 1) % max(x.dim(), 1)
    if axis == x.dim() - 1:
        return function(x, -1)
    return function(x.flatten(axis), -1).reshape(x.shape)


@op("TopK")
def top_k(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    count = call.scalar(1) if call.has(1) else call.integer("k")
    axis, largest = call.integer("axis", -1), bool(call.integer("largest", 1))
    # of equal values the first comes first, which torch.topk does not promise
    values, indices = torch.sort(call.tensor(0), dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@op("CumSum")
def cumulative_sum(call: Call) -> torch.Tensor:
    x, axis = call.tensor(0), int(call.scalar(1))
    if call.integer("reverse"):
        x = x.flip(axis)
    total = torch.cumsum(x, axis, dtype=x.dtype)
    if call.integer("exclusive"):
        total = total - x
    return total.flip(axis) if call.integer("reverse") else total


@op("LpNormalization")
def lp_normalization(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    order, axis = call.integer("p", 2), call.integer("axis", -1)
    norm: torch.Tensor = torch.linalg.vector_norm(x, order, axis, keepdim=True)
    return torch.where(norm == 0, norm, x / norm)
