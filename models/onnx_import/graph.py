"""The nodes of an ONNX graph as plain records, from and after rewriting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from thresher.models.onnx_import.dry_run import DryRun, Facts, Input
from thresher.models.onnx_import.match import Matcher
from thresher.models.onnx_import.names import scope
from thresher.models.onnx_import.node import Node, torch_tensor
from thresher.models.onnx_import.raise_attention import raise_attention
from thresher.models.onnx_import.raise_layers import raise_einsum, raise_layers
from thresher.models.onnx_import.raise_tables import raise_tables


def nodes_of(model: ir.Model) -> list[Node]:
    """The nodes that the outputs need, in order."""
    opset = model.opset_imports.get("", 1)
    nodes = [_node(node, opset) for node in model.graph]
    wanted = {value.name or "" for value in model.graph.outputs}
    kept: list[Node] = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _node(node: ir.Node, opset: int) -> Node:
    outputs = [value.name or "" for value in node.outputs]
    while len(outputs) > 1 and not node.outputs[len(outputs) - 1].uses():
        if node.outputs[len(outputs) - 1].is_graph_output() or node.op_type == "Split":
            break
        outputs.pop()
    return Node(
        op=node.op_type,
        domain=node.domain,
        name=node.name or node.outputs[0].name or node.op_type,
        inputs=tuple((value.name or "") if value is not None else "" for value in node.inputs),
        outputs=tuple(outputs),
        attributes={name: _attribute(attribute) for name, attribute in node.attributes.items()},
        opset=opset,
        scope=scope(node),
    )


def _attribute(attribute: ir.Attr) -> Any:
    return attribute.value.decode() if isinstance(attribute.value, bytes) else attribute.value


def constants_of(model: ir.Model) -> dict[str, torch.Tensor]:
    """Initializers, and what nodes of type Constant hold, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            found[name] = torch_tensor(value.const_value)
    return found


def raised(
    model: ir.Model, inputs: Sequence[Input], sizes: Mapping[str, int]
) -> tuple[list[Node], Facts, int, dict[str, Any]]:
    """Fold, raise layers and attention, check by a second dry run that no output changed its shape.

    Returns the nodes, the facts about them, the number of attentions and the fate of the symbols.
    """
    first = DryRun(inputs, sizes, constants_of(model))
    first.run(nodes_of(model))
    before = _shapes(first, model.graph.outputs)
    matcher = Matcher(model.graph, first.facts)
    raise_einsum(matcher)
    raise_tables(matcher)
    raise_layers(matcher)
    count = raise_attention(matcher)
    nodes = [n for n in nodes_of(model) if not all(map(first.facts.known, n.outputs))]
    second = DryRun(inputs, sizes, first.facts.constants)
    second.facts.static.update(first.facts.static)
    second.facts.made = first.facts.made
    facts = second.run(nodes)
    after = _shapes(second, model.graph.outputs)
    if before != after:
        raise RuntimeError(f"raising layers changed the output shapes from {before} to {after}")
    return nodes, facts, count, second.symbols()


def _shapes(run: DryRun, values: Iterable[ir.Value]) -> list[list[str]]:
    names = [value.name or "" for value in values]
    shapes = [() if run.facts.known(name) else run.shape(name) for name in names]
    return [["*" if isinstance(size, torch.SymInt) else str(size) for size in s] for s in shapes]
