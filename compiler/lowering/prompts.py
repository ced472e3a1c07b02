"""Prompts as branches of their own, for a runtime that packs constant weights of its own products only.

An operator that skips weights for few tokens has a dense form for many.  As one node it would have to
pack its weights in every call; behind an ``If`` on the number of tokens the runtime does so once, at the
price of a second copy of the weights in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import onnx_ir as ir

from thresher.kernels.registry import DOMAIN, OPERATORS, Operator


def branch_prompts(model: ir.Model) -> None:
    """Put each skipping node whose number of tokens is open behind an ``If``, beside its dense form."""
    few: dict[tuple[object, ...], ir.Value] = {}
    for node in list(model.graph):
        operator = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        x = node.inputs[0] if node.inputs else None
        if operator is None or not operator.dense or x is None or _lead(x) is None:
            continue
        most = node.attributes["most_tokens"].as_int()
        key = (most, *(_lead(x) or ()))
        if key not in few:
            made = _few(x, most)
            model.graph.insert_before(node, made)
            few[key] = made[-1].outputs[0]
        _branch(model.graph, node, operator, few[key])


def _lead(x: ir.Value) -> tuple[object, ...] | None:
    """What tells the leading axes of a tensor from others; None where all are fixed."""
    sizes = [None, None] if x.shape is None else list(x.shape)[:-1]
    if all(isinstance(size, int) for size in sizes):
        return None
    known = [size if isinstance(size, int) else size and size.value for size in sizes]
    return (x,) if None in known else tuple(known)


def _few(x: ir.Value, most: int) -> list[ir.Node]:
    """Nodes that say whether thresholds hold; the last one yields the answer."""
    name = f"{x.name}/few"
    lead = ir.Node("", "Shape", [x], [ir.AttrInt64("start", 0), ir.AttrInt64("end", -1)])
    count = ir.Node("", "ReduceProd", lead.outputs, [ir.AttrInt64("keepdims", 0)])
    limit = ir.Node("", "Constant", [], [ir.AttrInt64("value_int", most)])
    answer = ir.Node("", "LessOrEqual", [count.outputs[0], limit.outputs[0]])
    nodes = [lead, count, limit, answer]
    axes = None if x.shape is None else len(x.shape) - 1
    for node, shape in zip(nodes, ([axes], [], [], []), strict=True):
        (value,) = node.outputs
        kind = ir.DataType.BOOL if node is answer else ir.DataType.INT64
        value.type, value.shape = ir.TensorType(kind), ir.Shape(shape)
        node.name = value.name = f"{name}/{node.op_type}"
    return nodes


def _branch(graph: ir.Graph, node: ir.Node, operator: Operator, few: ir.Value) -> None:
    (y,) = node.outputs
    name = y.name or node.op_type
    made = ir.Node("", "If", [few], metadata_props=dict(node.metadata_props), name=f"{name}/If")
    result = _like(made.outputs[0], y, name)
    graph.insert_before(node, made)
    place = next((i for i, output in enumerate(graph.outputs) if output is y), None)
    if place is not None:
        graph.outputs[place] = result
    ir.convenience.replace_all_uses_with(y, result)
    graph.remove(node)
    y.name = f"{name}/few"
    branches = {"then_branch": ([node], y), "else_branch": _dense(operator, node, name)}
    for branch, (nodes, output) in branches.items():
        made.attributes.add(ir.AttrGraph(branch, _graph(nodes, output)))


def _dense(operator: Operator, node: ir.Node, name: str) -> tuple[list[ir.Node], ir.Value]:
    """The dense form of a node, and its result."""
    form = dataclasses.replace(operator, body=operator.dense)
    function = ir.serde.deserialize_function(form.function())
    values = dict(zip(function.inputs, node.inputs, strict=True))
    nodes = []
    for inner in function:
        given, notes = [value and values[value] for value in inner.inputs], node.metadata_props
        made = ir.Node("", inner.op_type, given, inner.attributes, metadata_props=dict(notes))
        made.name = made.outputs[0].name = f"{name}/many/{inner.outputs[0].name}"
        values[inner.outputs[0]] = made.outputs[0]
        nodes.append(made)
    result = values[function.outputs[0]]
    assert result is not None
    return nodes, _like(result, node.outputs[0], f"{name}/many")


def _like(value: ir.Value, other: ir.Value, name: str) -> ir.Value:
    value.name, value.type, value.shape = name, other.type, other.shape
    return value


def _graph(nodes: Iterable[ir.Node], output: ir.Value) -> ir.Graph:
    return ir.Graph([], [output], nodes=nodes, name=output.name)
