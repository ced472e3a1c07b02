"""Index arithmetic that exporters write where a model only looks along an axis.

A slice of a position table up to a dynamic length would tie the length to the table's; indices
0, 1, 2, ... taken of both axes of a padding mask only insert axes.  Said plainly, lengths stay free
and the analysis sees which axis runs over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from thresher.models.onnx_import.match import Matcher
from thresher.models.onnx_import.values import same


def raise_tables(m: Matcher) -> None:
    """Rewrite slices of tables, look-ups in uniform tables, and look-ups along whole axes."""
    rules = {
        "Slice": _slice,
        "GatherElements": _uniform,
        "GatherND": _pairs,
        "Gather": _flat_pairs,
    }
    for node in list(m.graph):
        if node.op_type in rules and node.domain == "":
            new = rules[node.op_type](m, node)
            if new is not None:
                m.replace(node.outputs[0], new)


# --- tables -------------------------------------------------------------------------------------


def _slice(m: Matcher, node: ir.Node) -> ir.Value | None:
    """Rows of a constant from a fixed start to a dynamic end, as a look-up by counted positions."""
    table, bounds = m.constant(node.inputs[0]), [m.constant(value) for value in node.inputs[1:]]
    if table is None or len(bounds) < 3 or bounds[0] is None or bounds[1] is not None:
        return None
    axes, steps = bounds[2], bounds[3] if len(bounds) > 3 else None
    if axes is None or axes.numel() != 1 or (steps is not None and steps.tolist() != [1]):
        return None
    axis, start = int(axes) % table.dim(), int(bounds[0])
    after = table.dim() - axis - 1
    if start < 0 or after > 1 or any(size != 1 for size in table.shape[:axis]):
        return None
    shape = m.shape(node.outputs[0])
    rows = table.reshape(table.shape[axis], -1)
    end = m.emit(node, "Squeeze", [node.inputs[2]], ())
    first, step = (m.literal(torch.tensor(n), "table_bound") for n in (start, 1))
    place = m.emit(node, "Range", [first, end, step], (shape[axis],))
    inserted = list(range(axis))
    if _is_uniform(rows):
        found = _full(m, node, rows[0, 0], place)
        inserted += [axis + 1] * after
    elif rows.shape[1] == 1 and _counts(rows[:, 0] - rows[0, 0]):
        offset = m.literal(rows[0, 0].clone(), "table_offset")
        found = m.emit(node, "Add", [place, offset], (shape[axis],)) if rows[0, 0] != 0 else place
        inserted += [axis + 1] * after
    else:
        title = node.inputs[0].name if node.inputs[0] is not None else None
        values = m.literal(rows if after else rows[:, 0], f"{title}_rows")
        found = m.emit(node, "Gather", [values, place], shape[axis:])
    return _unsqueezed(m, node, found, inserted, shape)


def _uniform(m: Matcher, node: ir.Node) -> ir.Value | None:
    """Any look-up in a table whose items are all the same, such as one of token types."""
    value, index = node.inputs[0], node.inputs[1]
    expand = m.producer(value, "Expand")
    table = m.constant(expand.inputs[0] if expand is not None else value)
    if table is None or index is None or not _is_uniform(table):
        return None
    return _full(m, node, table.reshape(-1)[0], index)


def _full(m: Matcher, node: ir.Node, item: torch.Tensor, like: ir.Value) -> ir.Value:
    fill, rank = m.literal(item.clone(), "table_item"), len(m.shape(like))
    sizes = m.emit(node, "Shape", [like], (rank,))
    return m.emit(node, "Expand", [fill, sizes], m.shape(like))


def _is_uniform(table: torch.Tensor) -> bool:
    return not table.is_floating_point() and bool((table == table.reshape(-1)[0]).all())


def _counts(items: torch.Tensor) -> bool:
    """Whether the items are 0, 1, 2, ..."""
    return not items.is_floating_point() and bool((items == torch.arange(items.numel())).all())


def _unsqueezed(
    m: Matcher, node: ir.Node, value: ir.Value, axes: Sequence[int], shape: tuple[Any, ...]
) -> ir.Value:
    if not axes:
        return value
    return m.emit(node, "Unsqueeze", [value, m.literal(torch.tensor(axes), "axes")], shape)


# --- whole axes ---------------------------------------------------------------------------------


def _pairs(m: Matcher, node: ir.Node) -> ir.Value | None:
    """``x[i, j]`` with whole ranges i and j, as GatherND of stacked indices."""
    x, stack = node.inputs[0], m.producer(node.inputs[1], "Concat")
    if x is None or stack is None or len(stack.inputs) != 2 or m.attribute(node, "batch_dims", 0):
        return None
    parts = []
    for value in stack.inputs:
        last = m.producer(value, "Unsqueeze", "Reshape")
        part = last.inputs[0] if last is not None else None
        wide = m.producer(part, "Expand")
        parts.append(wide.inputs[0] if wide is not None else part)
    return _along_axes(m, node, x, parts, m.shape(node.outputs[0]))


def _flat_pairs(m: Matcher, node: ir.Node) -> ir.Value | None:
    """The same by TorchScript's exporter: ``x.reshape(-1, 1)[i * width + j]``, reshaped back."""
    flat = m.producer(node.inputs[0], "Reshape", "Flatten")
    total = m.producer(node.inputs[1], "Add")
    x = flat.inputs[0] if flat is not None else None
    if x is None or total is None or len(m.shape(x)) != 2 or m.attribute(node, "axis", 0) != 0:
        return None
    shape, end = m.shape(total.outputs[0]), node
    while (up := m.consumer(end.outputs[0], "Reshape")) is not None:
        end = up
    if not _equal(m.shape(end.outputs[0]), shape):
        return None
    for columns, scaled in m.operands(total):
        product = m.producer(scaled, "Mul")
        for rows, width in m.operands(product) if product is not None else ():
            if same(m.size(width), m.shape(x)[1]):
                new = _along_axes(m, end, x, [rows, columns], shape)
                if new is not None:
                    m.replace(end.outputs[0], new)
                    return None
    return None


def _along_axes(
    m: Matcher, node: ir.Node, x: ir.Value, parts: Sequence[ir.Value | None], shape: tuple[Any, ...]
) -> ir.Value | None:
    """``x`` with axes inserted, if each part counts along one axis of ``shape``, in x's order."""
    axes = [_counted_axis(m, part, len(shape)) for part in parts]
    found = [axis for axis in axes if axis is not None]
    if len(found) != len(m.shape(x)) or found != sorted(set(found)):
        return None
    wanted: list[Any] = [1] * len(shape)
    for axis, size in zip(found, m.shape(x), strict=True):
        wanted[axis] = size
    if not _equal(tuple(wanted), shape):
        return None
    inserted = [axis for axis in range(len(shape)) if axis not in found]
    return _unsqueezed(m, node, x, inserted, shape)


def _counted_axis(m: Matcher, value: ir.Value | None, rank: int) -> int | None:
    """The axis, among ``rank``, along which a value is 0, 1, 2, ... while it has no other axis."""
    if value is None:
        return None
    shape = m.shape(value)
    long = [axis for axis, size in enumerate(shape) if not same(size, 1)]
    if len(long) != 1:
        return None
    axis = rank - len(shape) + long[0]
    constant = m.constant(value)
    if constant is not None:
        return axis if _counts(constant.reshape(-1)) else None
    node = m.producer(value)
    while node is not None and node.op_type in ("Unsqueeze", "Squeeze", "Reshape", "Cast"):
        node = m.producer(node.inputs[0])
    if node is None or node.op_type != "Range":
        return None
    return axis if (m.scalar(node.inputs[0]), m.scalar(node.inputs[2])) == (0.0, 1.0) else None


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))
