"""How much memory an engine will take, told from its graph before anything is built.

Weights are counted as they are stored, and those that both branches of an ``If`` read once more, packed
for the products of one.  Activations are the highest sum of the values that are alive at once, walking
the nodes in order: a value lives from the node that makes it to the last that reads it, inputs and
outputs to the end, and a change of shape shares the memory of what it changes.  An ``If`` takes what its
larger branch does, beside its results; an inserted step counts as one node.  A builder that fuses nodes
needs less, one that keeps scratch memory for its kernels more.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thresher.kernels.operator import reads
from thresher.runtime.feeds import PLUS
from thresher.runtime.manifest import Ranges, TensorInfo
from thresher.runtime.sample import LENGTH, batch_symbol

if TYPE_CHECKING:
    import onnx

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
}


@dataclass(frozen=True)
class Footprint:
    """Bytes, at ``sizes`` of the symbolic axes; weights that are packed besides count among the weights."""

    weights: int
    activations: int
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        return self.weights + self.activations

    def __str__(self) -> str:
        at = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return (
            f"{self.weights / 1e6:.1f} MB of weights and {self.activations / 1e6:.1f} MB of activations"
            f"{f' at {at}' if at else ''}"
        )


def largest(
    specs: Sequence[TensorInfo], ranges: Ranges, usual: Mapping[str, int]
) -> dict[str, int]:
    """The largest size of each symbolic axis; where it is open the usual one, or a batch of 1 and a
    length of 64."""
    batch = batch_symbol(specs)
    sizes: dict[str, int] = {}
    for axis in (axis for spec in specs for axis in spec.shape if isinstance(axis, str)):
        if PLUS in axis:
            continue  # arithmetic on the others
        low, high = ranges.get(axis, (1, None))
        sizes[axis] = high or usual.get(axis) or max(low, 1 if axis == batch else LENGTH)
    return sizes


def footprint(model: onnx.ModelProto, sizes: Mapping[str, int]) -> Footprint | None:
    """What a model needs at these sizes, or None where the file does not say the shape of a value."""
    graph = model.graph
    stored = {tensor.name: _bytes(tensor.data_type, tensor.dims) for tensor in graph.initializer}
    try:
        room = {
            value.name: _room(value, sizes)
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        for branch in (inner for node in graph.node for inner in _branches(node)):
            room |= {value.name: _room(value, sizes) for value in branch.value_info}
        weights = sum(stored.values()) + _packed(graph)
        return Footprint(weights, _peak(graph, stored, room), dict(sizes))
    except KeyError:
        return None


def _branches(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Of an ``If``; none of any other node."""
    return [a.g for a in node.attribute if a.HasField("g")] if node.op_type == "If" else []


def _packed(graph: onnx.GraphProto) -> int:
    """Bytes of the second copies: each matrix that all branches read, in a type that the CPU multiplies."""
    from onnx import TensorProto

    stored = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) > 1}
    found: dict[str, int] = {}
    for branches in filter(None, map(_branches, graph.node)):
        read = [{name for inner in g.node for name in reads(inner)} for g in branches]
        for name in set.intersection(*read) & stored.keys():
            kind, dims = stored[name].data_type, stored[name].dims
            wide = TensorProto.FLOAT if kind == TensorProto.BFLOAT16 else kind
            found[name] = _bytes(wide, dims)
    return sum(found.values())


def _peak(graph: onnx.GraphProto, stored: Mapping[str, int], room: Mapping[str, int]) -> int:
    """Bytes of the values alive at once; KeyError for one whose size is not known."""

    def size(name: str) -> int:
        return 0 if name in stored else room[name]

    def inner(name: str) -> int:  # what only a dense form written out has is small
        return room.get(name, 0)

    given = [value.name for value in graph.input]
    ends = [*given, *(value.name for value in graph.output)]
    return _most(graph.node, given, ends, size, inner)


def _most(
    nodes: Sequence[onnx.NodeProto],
    given: Sequence[str],
    ends: Sequence[str],
    size: Callable[[str], int],
    inner: Callable[[str], int],
) -> int:
    """The most that is alive at once of what is given and what the nodes make.

    ``ends`` live to the end; ``size`` is of values, ``inner`` of those in branches.
    """
    owner: dict[str, str] = {}  # of the memory that a view lies in
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        if node.op_type in VIEWS and not node.domain:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
        for name in (*node.output, *reads(node)):
            last[owner.get(name, name)] = index
    for name in ends:
        last[owner.get(name, name)] = len(nodes)
    made = {*given, *(name for node in nodes for name in node.output)}
    ending: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in made:
            ending.setdefault(index, []).append(name)

    def own(names: Iterable[str]) -> int:
        return sum(size(name) for name in names if name and name not in owner)

    peak = now = own(given)
    for index, node in enumerate(nodes):
        now += own(node.output)
        within = [_within(branch, inner) for branch in _branches(node)]
        peak = max(peak, now + max(within, default=0))
        now -= own(ending.get(index, ()))
    return peak


def _within(branch: onnx.GraphProto, size: Callable[[str], int]) -> int:
    """The most that a branch holds besides its results."""
    results = {value.name for value in branch.output}

    def inner(name: str) -> int:
        return 0 if name in results else size(name)

    return _most(branch.node, (), (), inner, size)


def _room(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> int:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise KeyError(value.name)
    shape = [
        axis.dim_value if axis.HasField("dim_value") else _size(axis.dim_param, sizes)
        for axis in tensor.shape.dim
    ]
    return _bytes(tensor.elem_type, shape)


def _bytes(kind: int, shape: Sequence[int]) -> int:
    import onnx

    width: int = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return math.prod(shape) * width


def _size(text: str, sizes: Mapping[str, int]) -> int:
    """A size that the file writes as arithmetic, such as ``(7*tokens + 9)//10``; KeyError for more."""
    try:
        return _value(ast.parse(text, mode="eval").body, sizes)
    except (SyntaxError, ZeroDivisionError) as error:
        raise KeyError(text) from error


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    """Raises KeyError for whatever is no integer arithmetic on known names."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, sizes)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=given):
            return _FUNCTIONS[name](*(_value(one, sizes) for one in given))
    raise KeyError(ast.dump(node))
