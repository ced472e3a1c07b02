"""Shape arithmetic: ONNX operators on host arrays, with symbolic sizes kept symbolic.

A handler here returns None to hand the node over to the tensor handlers, for instance where a
result would be long or where taking a slice would fix a symbolic size.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from thresher.models.onnx_import.node import Call, fill_value, torch_dtype
from thresher.models.onnx_import.values import Host, array, fits, host

HostResult = Host | list[Host] | None
HostHandler = Callable[[Call], HostResult]
HOST_HANDLERS: dict[str, HostHandler] = {}


def op(*names: str) -> Callable[[HostHandler], HostHandler]:
    def enter(handler: HostHandler) -> HostHandler:
        HOST_HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def _elementwise(function: Callable[..., Any], dtype: torch.dtype | None = None) -> HostHandler:
    """Broadcast ``function`` over the inputs; dtype of the first input unless told."""

    def handler(call: Call) -> HostResult:
        inputs = [call.host(index) for index in range(len(call))]
        arrays = np.broadcast_arrays(*(value.items for value in inputs))
        if arrays[0].size > 4096:
            return None
        items = (function(*row) for row in zip(*(a.flat for a in arrays), strict=True))
        return host(items, arrays[0].shape, dtype or inputs[0].dtype)

    return handler


def _symbolic(item: Any) -> bool:
    return isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool)


def _divide(a: Any, b: Any) -> Any:
    """ONNX divides integers towards zero; sizes are not negative, so floor division serves them."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    if _symbolic(a) or _symbolic(b):
        return a // b
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _equal(a: Any, b: Any) -> Any:
    """Equality that decides "size == -1" without a guard on the size."""
    for x, y in ((a, b), (b, a)):
        if isinstance(x, torch.SymInt) and isinstance(y, int) and y < 0:
            return False
    return bool(a == b)


def _power(a: Any, b: Any) -> Any:
    return torch.sym_sqrt(a) if _symbolic(a) and b == 0.5 else a**b


def _square_root(a: Any) -> Any:
    return torch.sym_sqrt(a) if _symbolic(a) else math.sqrt(a)


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def many(first: Any, *rest: Any) -> Any:
        for item in rest:
            first = function(first, item)
        return first

    return many


_ELEMENTWISE: dict[str, HostHandler] = {
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _elementwise(_divide),
    "Pow": _elementwise(_power),
    "Max": _elementwise(_fold(torch.sym_max)),
    "Min": _elementwise(_fold(torch.sym_min)),
    "Sum": _elementwise(_fold(operator.add)),
    "Neg": _elementwise(operator.neg),
    "Abs": _elementwise(abs),
    "Sqrt": _elementwise(_square_root),
    "Reciprocal": _elementwise(lambda a: 1.0 / a),
    "Floor": _elementwise(lambda a: torch.sym_float(math.floor(a))),
    "Ceil": _elementwise(lambda a: torch.sym_float(math.ceil(a))),
    "Round": _elementwise(lambda a: torch.sym_float(builtins.round(a))),
    "Identity": _elementwise(lambda a: a),
    "Equal": _elementwise(_equal, torch.bool),
    "Less": _elementwise(lambda a, b: bool(a < b), torch.bool),
    "Greater": _elementwise(lambda a, b: bool(a > b), torch.bool),
    "LessOrEqual": _elementwise(lambda a, b: bool(a <= b), torch.bool),
    "GreaterOrEqual": _elementwise(lambda a, b: bool(a >= b), torch.bool),
    "Not": _elementwise(operator.not_, torch.bool),
    "And": _elementwise(lambda a, b: bool(a and b), torch.bool),
    "Or": _elementwise(lambda a, b: bool(a or b), torch.bool),
}
HOST_HANDLERS.update(_ELEMENTWISE)


@op("Mod")
def modulo(call: Call) -> HostResult:
    whole = not call.integer("fmod") and not call.host(0).dtype.is_floating_point
    return _elementwise(operator.mod)(call) if whole else None


@op("Where")
def where(call: Call) -> HostResult:
    condition, yes, no = (call.host(index) for index in range(3))
    arrays = np.broadcast_arrays(condition.items, yes.items, no.items)
    items = ((a if c else b) for c, a, b in zip(*(x.flat for x in arrays), strict=True))
    return host(items, arrays[0].shape, yes.dtype)


@op("Cast")
def cast(call: Call) -> HostResult:
    dtype = torch_dtype(call.integer("to"))
    value = call.host(0)
    convert: Callable[[Any], Any] = torch.sym_float if dtype.is_floating_point else _whole
    if dtype is torch.bool:
        convert = bool
    return host((convert(item) for item in value.items.flat), value.items.shape, dtype)


def _whole(item: Any) -> Any:
    return torch.sym_int(item) if _symbolic(item) else int(item)


@op("Shape")
def shape(call: Call) -> HostResult:
    sizes = call.host(0).items.shape
    return host(sizes[call.integer("start") : call.integer("end", len(sizes))], None, torch.int64)


@op("Size")
def size(call: Call) -> HostResult:
    return host([call.host(0).items.size], (), torch.int64)


@op("Gather")
def gather(call: Call) -> HostResult:
    data, index = call.host(0), call.host(1)
    if not index.static:
        return None
    return _like(data, np.take(data.items, index.items.astype(np.int64), axis=call.integer("axis")))


@op("Slice")
def slice_(call: Call) -> HostResult:
    data = call.host(0)
    options = [call.listed(name) for name in ("starts", "ends", "axes", "steps")]
    for index, listed in enumerate(options):
        if listed is None and call.has(index + 1):
            options[index] = call.ints(index + 1)
    starts, ends, axes, steps = options
    if starts is None or ends is None or any(map(_symbolic, [*starts, *ends])):
        return None
    cut = [slice(None)] * data.items.ndim
    for position, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = steps[position] if steps else 1
        # for a negative step, an end below -size means "through the first item"
        low = None if step < 0 and end < -(2**30) else end
        cut[axes[position] if axes else position] = slice(start, low, step)
    return _like(data, data.items[tuple(cut)])


@op("Concat")
def concat(call: Call) -> HostResult:
    parts = [call.host(index) for index in range(len(call))]
    return _like(parts[0], np.concatenate([p.items for p in parts], axis=call.integer("axis")))


@op("Split")
def split(call: Call) -> HostResult:
    data, axis, count = call.host(0), call.integer("axis"), len(call.node.outputs)
    sizes = call.listed("split") or (call.ints(1) if call.has(1) else None)
    step = -(-data.items.shape[axis] // count)
    edges = np.cumsum(sizes)[:-1] if sizes else np.arange(1, count) * step
    return [_like(data, part) for part in np.split(data.items, edges, axis=axis)]


@op("Unsqueeze")
def unsqueeze(call: Call) -> HostResult:
    data = call.host(0)
    return _like(data, np.expand_dims(data.items, tuple(call.axes() or ())))


@op("Squeeze")
def squeeze(call: Call) -> HostResult:
    data, axes = call.host(0), call.axes()
    return _like(data, np.squeeze(data.items, None if axes is None else tuple(axes)))


@op("Reshape", "Flatten")
def reshape(call: Call) -> HostResult:
    data = call.host(0)
    if call.node.op == "Flatten":
        axis = call.integer("axis", 1)
        return _like(data, data.items.reshape(math.prod(data.items.shape[:axis]), -1))
    target = call.ints(1)
    if any(map(_symbolic, target)):
        return None
    if not call.integer("allowzero"):
        target = [data.items.shape[i] if size == 0 else size for i, size in enumerate(target)]
    return _like(data, data.items.reshape(target))


@op("Transpose")
def transpose(call: Call) -> HostResult:
    data = call.host(0)
    return _like(data, data.items.transpose(call.listed("perm")))


@op("Expand")
def expand(call: Call) -> HostResult:
    data, sizes = call.host(0), call.ints(1)
    if not fits(sizes):
        return None
    shape = np.broadcast_shapes(data.items.shape, tuple(sizes))
    return _like(data, np.broadcast_to(data.items, shape)) if fits(shape) else None


@op("ConstantOfShape")
def constant_of_shape(call: Call) -> HostResult:
    sizes = call.ints(0)
    if not fits(sizes):
        return None
    item, dtype = fill_value(call)
    return host([item] * math.prod(sizes), tuple(sizes), dtype)


@op("Range")
def range_(call: Call) -> HostResult:
    start, limit, delta = (call.host(index) for index in range(3))
    bounds = [value.items.item() for value in (start, limit, delta)]
    if any(map(_symbolic, bounds)):
        return None
    count = max(math.ceil((bounds[1] - bounds[0]) / bounds[2]), 0)
    if not fits([count]):
        return None
    return host((bounds[0] + i * bounds[2] for i in range(count)), None, start.dtype)


@op("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def reduce(call: Call) -> HostResult:
    data, axes = call.host(0), call.axes()
    if data.items.ndim != 1 or (axes is not None and list(axes) not in ([0], [-1])):
        return None
    join = {
        "ReduceProd": operator.mul,
        "ReduceSum": operator.add,
        "ReduceMax": torch.sym_max,
        "ReduceMin": torch.sym_min,
    }[call.node.op]
    total = _fold(join)(*data.items.flat)
    return host([total], (1,) if call.integer("keepdims", 1) else (), data.dtype)


def _like(data: Host, items: Any) -> Host:
    """The rearranged items of ``data``; numpy gives the bare item for a rank of zero."""
    return Host(items if isinstance(items, np.ndarray) else array([items], ()), data.dtype)
