"""Operators that rearrange, cut, join, repeat or make tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from thresher.models.onnx_import.node import Call, fill_value, op, torch_dtype
from thresher.models.onnx_import.values import Host, host, same


@op("Shape")
def shape(call: Call) -> Host:
    sizes = call.tensor(0).shape
    return host(sizes[call.integer("start") : call.integer("end", len(sizes))], None, torch.int64)


@op("Size")
def size(call: Call) -> Host:
    return host([call.tensor(0).numel()], (), torch.int64)


@op("Reshape")
def reshape(call: Call) -> torch.Tensor:
    x, target = call.tensor(0), call.ints(1)
    if not call.integer("allowzero"):
        target = [x.shape[i] if _is(size, 0) else size for i, size in enumerate(target)]
    return x if _unchanged(x, target) else x.reshape(target)


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


def _unchanged(x: torch.Tensor, target: list[Any]) -> bool:
    if x.dim() != len(target) or sum(_is(size, -1) for size in target) > 1:
        return False
    return all(_is(size, -1) or same(own, size) for own, size in zip(x.shape, target, strict=True))


@op("Flatten")
def flatten(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    axis = call.integer("axis", 1)
    rows = 1
    for length in x.shape[:axis]:
        rows = rows * length
    return x.reshape(rows, -1)


@op("Transpose")
def transpose(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    return x.permute(call.listed("perm") or list(range(x.dim()))[::-1])


@op("Unsqueeze")
def unsqueeze(call: Call) -> torch.Tensor:
    x, axes = call.tensor(0), list(call.axes() or ())
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("Squeeze")
def squeeze(call: Call) -> torch.Tensor:
    x, axes = call.tensor(0), call.axes()
    if axes is None:
        axes = [axis for axis, length in enumerate(x.shape) if _is(length, 1)]
    if not axes:
        return x
    return x.squeeze(axes[0]) if len(axes) == 1 else x.squeeze(tuple(axes))


@op("Concat")
def concat(call: Call) -> torch.Tensor:
    return torch.cat(call.tensors(), call.integer("axis"))


@op("Split")
def split(call: Call) -> list[torch.Tensor]:
    x, axis = call.tensor(0), call.integer("axis")
    sizes = call.listed("split") or (call.ints(1) if call.has(1) else None)
    if sizes is None:
        sizes = [-(-x.shape[axis] // len(call.node.outputs))]
        return list(torch.split(x, sizes[0], axis))
    return list(torch.split(x, sizes, axis))


@op("Slice")
def slice_(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    starts, ends, axes, steps = (
        call.ints(index) if call.has(index) else call.listed(name)
        for index, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    )
    if starts is None or ends is None:
        raise ValueError("starts or ends are missing")
    for position, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[position] if axes else position
        step = steps[position] if steps else 1
        x = _cut(x, axis % x.dim(), start, end, step)
    return x


def _cut(x: torch.Tensor, axis: int, start: Any, end: Any, step: int) -> torch.Tensor:
    if step < 0:
        if not (step == -1 and _is(start, -1) and isinstance(end, int) and end < -(2**30)):
            raise ValueError("a negative step is supported only to reverse a whole axis")
        return x.flip(axis)
    everything = _is(start, 0) and isinstance(end, int) and end >= 2**30
    if everything and step == 1:
        return x
    bounds = [slice(None)] * axis + [slice(start, end, step)]
    return x[tuple(bounds)]


@op("Expand")
def expand(call: Call) -> torch.Tensor:
    x, target = call.tensor(0), call.ints(1)
    rank = max(x.dim(), len(target))
    own = [1] * (rank - x.dim()) + list(x.shape)
    asked = [1] * (rank - len(target)) + target
    shape = [b if _is(a, 1) else a for a, b in zip(own, asked, strict=True)]
    value = call.value(0)
    if isinstance(value, Host) and value.items.size == 1 and value.source is None:
        return torch.full(shape, value.items.item(), dtype=value.dtype)
    return x.expand(shape)


@op("Tile")
def tile(call: Call) -> torch.Tensor:
    return call.tensor(0).repeat(call.ints(1))


@op("ConstantOfShape")
def constant_of_shape(call: Call) -> torch.Tensor:
    item, dtype = fill_value(call)
    return torch.full(call.ints(0), item, dtype=dtype)


@op("Range")
def range_(call: Call) -> torch.Tensor:
    start, limit, delta = (call.scalar(index) for index in range(3))
    return torch.arange(start, limit, delta, dtype=call.host(0).dtype)


@op("EyeLike")
def eye_like(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    dtype = torch_dtype(call.integer("dtype")) if "dtype" in call.node.attributes else x.dtype
    rows = torch.arange(x.shape[0]).unsqueeze(1)
    return (torch.arange(x.shape[1]) - rows == call.integer("k")).to(dtype)


@op("Dropout")
def dropout(call: Call) -> list[torch.Tensor]:
    x = call.tensor(0)
    if call.has(2) and call.scalar(2):
        raise ValueError("Dropout in training mode is not supported")
    return [x, torch.ones_like(x, dtype=torch.bool)][: len(call.node.outputs)]


@op("Trilu")
def triangle(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    k = int(call.scalar(1)) if call.has(1) else 0
    return torch.triu(x, k) if call.integer("upper", 1) else torch.tril(x, k)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@op("Pad")
def pad(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    amounts = call.ints(1) if call.has(1) else list(call.listed("pads") or ())
    axes = call.ints(3) if call.has(3) else list(range(x.dim()))
    before, after = [0] * x.dim(), [0] * x.dim()
    for position, axis in enumerate(axes):
        before[axis] = amounts[position]
        after[axis] = amounts[position + len(axes)]
    flat = [amount for axis in reversed(range(x.dim())) for amount in (before[axis], after[axis])]
    mode = _PAD_MODES[call.text("mode", "constant")]
    if mode == "constant":
        value = call.scalar(2) if call.has(2) else call.number("value")
        return F.pad(x, flat, mode, value)
    while len(flat) > 4 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode)


@op("DepthToSpace")
def depth_to_space(call: Call) -> torch.Tensor:
    x, block = call.tensor(0), call.integer("blocksize")
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    x = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // block**2, h * block, w * block)


@op("SpaceToDepth")
def space_to_depth(call: Call) -> torch.Tensor:
    x, block = call.tensor(0), call.integer("blocksize")
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, c * block**2, h // block, w // block)
