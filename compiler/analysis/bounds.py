"""Least and largest value that a tensor's elements can take, whatever the inputs and their sizes.

Interval arithmetic over the operators that masks are made of; an operator without a rule may yield
anything.  Inputs may hold anything, a symbolic size is at least 0, and a weight holds what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from thresher.compiler.program import Program

aten = torch.ops.aten


class Bounds(NamedTuple):
    """A closed interval; booleans are 0 and 1."""

    low: float
    high: float


Rule = Callable[..., Bounds]  # of the ValueBounds and the node's arguments
ANYTHING = Bounds(-math.inf, math.inf)
SIZE = Bounds(0, math.inf)
NO, YES, PERHAPS = Bounds(0, 0), Bounds(1, 1), Bounds(0, 1)
_MOVING = (  # elements stay what they are, wherever they go
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "gather", "index", "index_select",
    "lift_fresh_copy", "permute", "repeat", "reshape", "select", "slice", "squeeze", "t",
    "transpose", "unflatten", "unsqueeze", "view", "_unsafe_view",
)  # fmt: skip

_LOGICAL_ON_BOOLEANS = ("__and__", "__or__", "bitwise_and", "bitwise_not", "bitwise_or")


class ValueBounds:
    """Bounds of the nodes of one Program, worked out when asked for."""

    def __init__(self, program: Program) -> None:
        exported = program.exported
        stored: dict[str, Any] = {**exported.state_dict, **exported.constants}
        self._weights = {
            spec.arg.name: stored[spec.target]
            for spec in exported.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT and spec.target in stored
        }
        self._known: dict[fx.Node, Bounds] = {}

    def of(self, value: object) -> Bounds:
        """Bounds of a node, or of a plain number."""
        if isinstance(value, (bool, int, float)):
            return ANYTHING if math.isnan(value) else Bounds(float(value), float(value))
        if not isinstance(value, fx.Node):
            return ANYTHING
        if value not in self._known:
            self._known[value] = self._infer(value)
        return self._known[value]

    def _infer(self, node: fx.Node) -> Bounds:
        if node.op == "placeholder":
            return _held(self._weights.get(node.name))
        if node.op != "call_function":
            return ANYTHING
        name = _name(node)
        if name in _MOVING:
            return self.of(node.args[0])
        if name == "_to_copy":
            return self._cast(node)
        rule = _RULES.get(name)
        if node.kwargs.get("alpha", 1) != 1 or (
            name in _LOGICAL_ON_BOOLEANS and node.meta["val"].dtype != torch.bool
        ):
            return ANYTHING
        found = rule(self, *node.args) if rule else ANYTHING
        return ANYTHING if any(map(math.isnan, found)) else found  # inf - inf, 0 * inf

    def _cast(self, node: fx.Node) -> Bounds:
        source: Any = node.args[0]
        bounds, dtype = self.of(source), node.meta["val"].dtype
        if dtype == torch.bool:
            return _truth(bounds)
        keeps = dtype.is_floating_point or not source.meta["val"].dtype.is_floating_point
        return bounds if keeps and dtype.itemsize >= 4 else ANYTHING


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _held(tensor: torch.Tensor | None) -> Bounds:
    if tensor is None or not tensor.numel() or tensor.is_complex():
        return ANYTHING
    least, most = (float(edge) for edge in tensor.detach().aminmax())
    return ANYTHING if math.isnan(least) else Bounds(least, most)


def _arange(of: ValueBounds, *args: Any) -> Bounds:
    start, end, *step = args if len(args) > 1 else (0, *args)
    if step and of.of(step[0]).low <= 0:
        return ANYTHING
    return Bounds(of.of(start).low, max(of.of(start).low, of.of(end).high))


def _constant(place: int) -> Rule:
    """The value is the argument at this place."""
    return lambda of, *args: of.of(args[place])


def _joined(of: ValueBounds, parts: Sequence[object], *_: object) -> Bounds:
    found = [of.of(part) for part in parts]
    return Bounds(min(b.low for b in found), max(b.high for b in found))


def _added(of: ValueBounds, a: object, b: object) -> Bounds:
    (low, high), (other_low, other_high) = of.of(a), of.of(b)
    return Bounds(low + other_low, high + other_high)


def _subtracted(of: ValueBounds, a: object, b: object) -> Bounds:
    (low, high), (other_low, other_high) = of.of(a), of.of(b)
    return Bounds(low - other_high, high - other_low)


def _multiplied(of: ValueBounds, a: object, b: object) -> Bounds:
    edges = [x * y for x in of.of(a) for y in of.of(b)]
    return Bounds(min(edges), max(edges)) if not any(map(math.isnan, edges)) else ANYTHING


def _either(of: ValueBounds, condition: object, a: object, b: object) -> Bounds:
    """Elements of a where the condition holds, else of b."""
    chosen = of.of(condition)
    if chosen in (YES, NO):
        return of.of(a if chosen == YES else b)
    return _joined(of, (a, b))


def _at_least(of: ValueBounds, a: object, b: object) -> Bounds:
    left, right = of.of(a), of.of(b)
    if left.low >= right.high and math.isfinite(left.low):  # no edge is finite where NaN may be
        return YES
    return NO if left.high < right.low and math.isfinite(left.high) else PERHAPS


def _equal(of: ValueBounds, a: object, b: object) -> Bounds:
    left, right = of.of(a), of.of(b)
    if left.low == left.high == right.low == right.high and math.isfinite(left.low):
        return YES
    apart = left.high < right.low or right.high < left.low
    return NO if apart else PERHAPS


def _truth(bounds: Bounds) -> Bounds:
    """Of the elements' truth: YES where none can be 0."""
    if bounds.low > 0 or bounds.high < 0:
        return YES
    return NO if bounds == NO else PERHAPS


def _both(of: ValueBounds, a: object, b: object) -> Bounds:
    found = {_truth(of.of(a)), _truth(of.of(b))}
    return NO if NO in found else YES if found == {YES} else PERHAPS


def _any(of: ValueBounds, a: object, b: object) -> Bounds:
    found = {_truth(of.of(a)), _truth(of.of(b))}
    return YES if YES in found else NO if found == {NO} else PERHAPS


def _not(of: ValueBounds, a: object) -> Bounds:
    return _opposite(_truth(of.of(a)))


def _opposite(truth: Bounds) -> Bounds:
    return Bounds(1 - truth.high, 1 - truth.low)


_RULES: dict[str, Rule] = {
    "__and__": _both,
    "__or__": _any,
    "add": _added,
    "arange": _arange,
    "bitwise_and": _both,
    "bitwise_not": _not,
    "bitwise_or": _any,
    "cat": _joined,
    "eq": _equal,
    "full": _constant(1),
    "full_like": _constant(1),
    "ge": _at_least,
    "gt": lambda of, a, b: _opposite(_at_least(of, b, a)),
    "le": lambda of, a, b: _at_least(of, b, a),
    "logical_and": _both,
    "logical_not": _not,
    "logical_or": _any,
    "lt": lambda of, a, b: _opposite(_at_least(of, a, b)),
    "masked_fill": lambda of, x, mask, value: _either(of, mask, value, x),
    "mul": _multiplied,
    "ne": lambda of, a, b: _opposite(_equal(of, a, b)),
    "new_full": _constant(2),
    "new_ones": lambda of, *_: YES,
    "new_zeros": lambda of, *_: NO,
    "ones": lambda of, *_: YES,
    "ones_like": lambda of, *_: YES,
    "scalar_tensor": _constant(0),
    "sub": _subtracted,
    "sym_size": lambda of, *_: SIZE,
    "where": _either,
    "zeros": lambda of, *_: NO,
    "zeros_like": lambda of, *_: NO,
}
