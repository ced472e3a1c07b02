"""Gathering, scattering and one-hot."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from thresher.models.onnx_import.node import Call, op
from thresher.models.onnx_import.values import Host, Value, host


@op("Gather")
def gather(call: Call) -> torch.Tensor:
    x, axis, index = call.tensor(0), call.integer("axis"), call.value(1)
    axis = axis % x.dim()
    if isinstance(index, Host) and index.items.size == 1:
        picked = x.select(axis, index.items.item())
        return picked if index.items.ndim == 0 else _lift(picked, axis, index.items.ndim)
    rows = _from_front(index, x.shape[axis])
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(rows, x)
    flat = torch.index_select(x, axis, rows.reshape(-1))
    return flat.reshape(*x.shape[:axis], *rows.shape, *x.shape[axis + 1 :])


def _lift(x: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    for _ in range(count):
        x = x.unsqueeze(axis)
    return x


def _from_front(index: Value, length: Any) -> torch.Tensor:
    """Indices counted from the front.  Only constants count from the back in practice, and
    checking data at run time would burden every embedding, so indices that are data stay."""
    if isinstance(index, Host):
        items: list[Any] = list(index.items.flat)
        if not index.static or not any(item < 0 for item in items):
            return index.tensor()
        front = [item + length if item < 0 else item for item in items]
        return host(front, index.items.shape, index.dtype).tensor()
    if isinstance(index, torch._subclasses.FakeTensor) or index.numel() == 0:
        return index
    return torch.where(index < 0, index + length, index) if bool((index < 0).any()) else index


@op("GatherElements")
def gather_elements(call: Call) -> torch.Tensor:
    return torch.gather(call.tensor(0), call.integer("axis"), call.tensor(1))


@op("GatherND")
def gather_nd(call: Call) -> torch.Tensor:
    x, index, batch = call.tensor(0), call.tensor(1), call.integer("batch_dims")
    depth = index.shape[-1]
    if not isinstance(depth, int):
        raise ValueError("the last axis of the indices must have a fixed size")
    grid: list[torch.Tensor] = []
    for axis in range(batch):  # position in each batch axis, broadcast against the indices
        tail = index.dim() - 2 - axis
        grid.append(torch.arange(index.shape[axis]).reshape(-1, *[1] * tail))
    return x[(*grid, *index.unbind(-1))] if depth else x


@op("ScatterElements")
def scatter_elements(call: Call) -> torch.Tensor:
    x, index, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    mode, axis = call.text("reduction", "none"), call.integer("axis")
    if mode == "none":
        return torch.scatter(x, axis, index, updates)
    name = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[mode]
    return torch.scatter_reduce(x, axis, index, updates, name)


@op("ScatterND")
def scatter_nd(call: Call) -> torch.Tensor:
    if call.text("reduction", "none") != "none":
        raise ValueError("ScatterND with a reduction is not supported")
    index = tuple(call.tensor(1).unbind(-1))
    return torch.index_put(call.tensor(0), index, call.tensor(2))


@op("OneHot")
def one_hot(call: Call) -> torch.Tensor:
    index, axis = call.tensor(0), call.integer("axis", -1)
    depth, (low, high) = call.scalar(1), call.tensor(2).unbind()
    hot = torch.where(index < 0, index + depth, index).unsqueeze(-1)
    return torch.where(torch.arange(depth) == hot, high, low).movedim(-1, axis)
