"""Masks of attention: added up, and said as plainly as the broadcasting of attention allows."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from thresher.models.onnx_import.evaluate import compute
from thresher.models.onnx_import.match import Matcher
from thresher.models.onnx_import.node import Node

_POINTWISE = ("Where", "And", "Or", "Not", "Cast", "Add", "Sub", "Mul")


def sum_of_masks(m: Matcher, at: ir.Node, masks: list[ir.Value]) -> ir.Value | None:
    """One additive mask in front of ``at``, or None if there is nothing to add."""
    total: ir.Value | None = None
    for mask in masks:
        known = _known(m, mask, 6)
        if known is not None and not known.any():
            continue
        if known is not None and m.constant(mask) is None:
            mask = m.literal(known, "attention_mask")
        mask = lean(m, at, mask)
        if total is None:
            total = mask
            continue
        total = m.emit(at, "Add", [total, mask], _broadcast(m, [total, mask]))
    return total


def _known(m: Matcher, value: ir.Value | None, depth: int) -> torch.Tensor | None:
    """A mask made of constants, not expanded: attention broadcasts it, whatever the batch is."""
    tensor = m.constant(value)
    node = m.producer(value, "Expand", *_POINTWISE)
    if tensor is not None or node is None or depth == 0:
        return tensor
    if node.op_type == "Expand":
        return _known(m, node.inputs[0], depth - 1)
    inputs = [_known(m, item, depth - 1) for item in node.inputs]
    if any(item is None for item in inputs):
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    record = Node(node.op_type, "", node.name or "", (), ("",), attributes, 13, "")
    (result,) = compute(record, list(inputs))
    return result if isinstance(result, torch.Tensor) else result.tensor()


def lean(m: Matcher, at: ir.Node, mask: ir.Value) -> ir.Value:
    """The mask without expansions and without conditions that always hold; once for all layers."""
    name = mask.name or ""
    if name not in m.lean_masks:
        m.lean_masks[name] = _lean(m, at, mask, 8)
    return m.lean_masks[name]


def _lean(m: Matcher, at: ir.Node, value: ir.Value, depth: int) -> ir.Value:
    node = m.producer(value, "Expand", *_POINTWISE)
    if node is None or depth == 0 or m.constant(value) is not None:
        return value
    if node.op_type == "Expand" and node.inputs[0] is not None:
        return _lean(m, at, node.inputs[0], depth - 1)
    inputs = [item for item in node.inputs if item is not None]
    if node.op_type == "And":
        for condition, other in m.operands(node):
            if _holds(m, condition, 8):
                return _lean(m, at, other, depth - 1)
    lean = [_lean(m, at, item, depth - 1) for item in inputs]
    if all(a is b for a, b in zip(lean, inputs, strict=True)):
        return value
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return m.emit(at, node.op_type, lean, _broadcast(m, lean), attributes)


def _holds(m: Matcher, value: ir.Value | None, depth: int) -> bool:
    """Whether a condition is true of every position: positions are not negative."""
    tensor = m.constant(value)
    if tensor is not None:
        return bool(tensor.all())
    node = m.producer(value, "Expand", "Cast", "And", "GreaterOrEqual")
    if node is None or depth == 0:
        return False
    if node.op_type in ("Expand", "Cast"):
        return _holds(m, node.inputs[0], depth - 1)
    if node.op_type == "And":
        return all(_holds(m, item, depth - 1) for item in node.inputs)
    bound = m.scalar(node.inputs[1])
    up = m.producer(node.inputs[0])
    while up is not None and up.op_type in ("Unsqueeze", "Reshape", "Cast", "Expand"):
        up = m.producer(up.inputs[0])
    if up is None or up.op_type != "Range" or bound is None or bound > 0:
        return False
    start, step = m.scalar(up.inputs[0]), m.scalar(up.inputs[2])
    return start is not None and step is not None and start >= 0 and step > 0


def _broadcast(m: Matcher, values: list[ir.Value]) -> tuple[Any, ...]:
    """Shape of the values together; an axis of size 1 gives way."""
    shapes = [m.shape(value) for value in values]
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(
        next((size for size in sizes if not (isinstance(size, int) and size == 1)), 1)
        for sizes in zip(*padded, strict=True)
    )
