"""Prompts as branches of their own, for a runtime that packs constant weights of its own products only.

An operator that skips weights for few tokens has a dense form for many.  As one node it would have to
pack its weights in every call; behind an ``If`` on the number of tokens the runtime does so once, at the
price of a second copy of the weights in memory.  An ``If`` costs time at every step, so one holds as much
of the graph as can be held without another second copy: in a decoder whose linears all skip, all blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import onnx_ir as ir

from thresher.kernels.registry import DOMAIN, OPERATORS, Operator

PACKED = frozenset({"MatMul", "Gemm", "Conv"})  # whose weights the runtime keeps in its own form
Question: TypeAlias = tuple[object, ...]


def branch_prompts(model: ir.Model) -> None:
    """Put skipping nodes whose number of tokens is open behind an ``If``, beside their dense form.

    Neighbours that ask the same question share one ``If`` with what lies between them, up to the next
    product with weights that are not skipped.
    """
    few: dict[Question, ir.Value] = {}
    for question, run in list(_runs(model.graph)):
        if question not in few:
            x = run[0].inputs[0]
            assert x is not None
            made = _few(x, run[0].attributes["most_tokens"].as_int())
            model.graph.insert_before(run[0], made)
            few[question] = made[-1].outputs[0]
        _branch(model.graph, run, few[question])


def _runs(graph: ir.Graph) -> Iterator[tuple[Question, list[ir.Node]]]:
    """Skipping nodes that one ``If`` takes together, and what it asks."""
    asked: Question | None = None
    run: list[ir.Node] = []
    for node in graph:
        question = _question(node)
        if run and (_packs(node) if question is None else question != asked):
            assert asked is not None
            yield asked, run
            run = []
        if question is not None:
            asked = question
            run.append(node)
    if run and asked is not None:
        yield asked, run


def _question(node: ir.Node) -> Question | None:
    """What a skipping node asks of its tokens; None for other nodes and where their number is fixed."""
    x, operator = node.inputs[0] if node.inputs else None, _skipping(node)
    if operator is None or x is None:
        return None
    sizes = [None, None] if x.shape is None else list(x.shape)[:-1]
    if all(isinstance(size, int) for size in sizes):
        return None
    known = [size if isinstance(size, int) else size and size.value for size in sizes]
    most = node.attributes["most_tokens"].as_int()
    return (most, x) if None in known else (most, *known)


def _skipping(node: ir.Node) -> Operator | None:
    operator = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
    return operator if operator is not None and operator.dense else None


def _packs(node: ir.Node) -> bool:
    """Whether weights are multiplied that a second branch would hold once more."""
    return node.op_type in PACKED and any(v is not None and _stored(v) for v in node.inputs)


def _stored(value: ir.Value) -> bool:
    """Whether a value is constant, or a constant turned round."""
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose" and maker.inputs[0] is not None:
        return _stored(maker.inputs[0])
    return value.is_initializer()


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


def _branch(graph: ir.Graph, run: Sequence[ir.Node], few: ir.Value) -> None:
    """Put all that lies between the nodes of a run behind one ``If``."""
    region = _between(graph, run)
    inside = set(region)
    results = [value for node in region for value in node.outputs if _leaves(value, inside)]
    many, copies = _dense(region)
    notes = region[0].metadata_props if len(region) == 1 else {}
    made = ir.Node("", "If", [few], num_outputs=len(results), metadata_props=dict(notes))
    made.name = f"{results[0].name}/If"
    graph.insert_before(region[0], made)
    for value, outer in zip(results, made.outputs, strict=True):
        _like(outer, value, str(value.name))
        value.name = f"{outer.name}/few"
        copies[value].name = f"{outer.name}/many"
        for user, at in list(value.uses()):
            if user not in inside:
                user.replace_input_with(at, outer)
        for at, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[at] = outer
    graph.remove(region)
    branches = {
        "then_branch": (region, results),
        "else_branch": (many, [copies[value] for value in results]),
    }
    for branch, (nodes, outputs) in branches.items():
        inner = ir.Graph([], outputs, nodes=nodes, name=f"{made.name}/{branch}")
        made.attributes.add(ir.AttrGraph(branch, inner))
    graph.sort()  # what hangs on the ``If`` may have stood between the nodes


def _between(graph: ir.Graph, run: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes of a run, and those that read something of one and lead to another; in order."""
    behind, before = set(run), set(run)
    for node in graph:
        if not behind.isdisjoint(node.predecessors()):
            behind.add(node)
    for node in reversed(graph):
        if not before.isdisjoint(node.successors()):
            before.add(node)
    return [node for node in graph if node in behind and node in before]


def _leaves(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(user not in inside for user, _ in value.uses())


def _dense(region: Sequence[ir.Node]) -> tuple[list[ir.Node], dict[ir.Value, ir.Value]]:
    """A copy of the nodes with dense forms of those that skip, and the copies of their values."""
    nodes: list[ir.Node] = []
    copies: dict[ir.Value, ir.Value] = {}
    for node in region:
        inputs = [value and copies.get(value, value) for value in node.inputs]
        operator = _skipping(node)
        if operator is None:
            made = [ir.Node(node.domain, node.op_type, inputs, node.attributes.values(),
                            num_outputs=len(node.outputs))]  # fmt: skip
        else:
            made = _written_out(operator, inputs, str(node.outputs[0].name))
        for value, copy in zip(node.outputs, made[-1].outputs, strict=True):
            copies[value] = _like(copy, value, f"{value.name}/many")
        for one in made:
            one.metadata_props.update(node.metadata_props)
            one.name = one.outputs[0].name
        nodes += made
    return nodes, copies


def _written_out(operator: Operator, inputs: Sequence[ir.Value | None], name: str) -> list[ir.Node]:
    """The nodes of a dense form, of which the last one makes the result."""
    form = dataclasses.replace(operator, body=operator.dense)
    function = ir.serde.deserialize_function(form.function())
    values = dict(zip(function.inputs, inputs, strict=True))
    nodes = []
    for inner in function:
        given = [value and values[value] for value in inner.inputs]
        made = ir.Node("", inner.op_type, given, inner.attributes.values())
        made.outputs[0].name = f"{name}/many/{inner.outputs[0].name}"
        values[inner.outputs[0]] = made.outputs[0]
        nodes.append(made)
    return nodes


def _like(value: ir.Value, other: ir.Value, name: str) -> ir.Value:
    value.name, value.type, value.shape = name, other.type, other.shape
    return value
