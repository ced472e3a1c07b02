"""Looking at a graph and replacing pieces of it; shared by the raising of layers and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from thresher.models.onnx_import.dry_run import Facts


class Matcher:
    """A graph together with the facts of a dry run.  Values are found by name in the facts."""

    def __init__(self, graph: ir.Graph, facts: Facts) -> None:
        self.graph = graph
        self.facts = facts
        self.lean_masks: dict[str, ir.Value] = {}

    def producer(self, value: ir.Value | None, *ops: str) -> ir.Node | None:
        """The node that makes a value, if it is one of ``ops`` (any, if none is given)."""
        node = value.producer() if value is not None else None
        if node is None or (ops and node.op_type not in ops) or node.domain not in ("", "raised"):
            return None
        return node

    def consumer(self, value: ir.Value, *ops: str) -> ir.Node | None:
        """The only user of a value, if it is one of ``ops``."""
        users = {id(use.node): use.node for use in value.uses()}
        if len(users) != 1 or value.is_graph_output():
            return None
        node = next(iter(users.values()))
        return node if node.op_type in ops and node.domain == "" else None

    def constant(self, value: ir.Value | None) -> torch.Tensor | None:
        """A value that is known, as a tensor."""
        if value is None or value.name is None:
            return None
        if value.name in self.facts.static:
            return self.facts.static[value.name].tensor()
        return self.facts.constants.get(value.name)

    def scalar(self, value: ir.Value | None) -> float | None:
        """The number in a known value of one item."""
        tensor = self.constant(value)
        return float(tensor.item()) if tensor is not None and tensor.numel() == 1 else None

    def shape(self, value: ir.Value) -> tuple[Any, ...]:
        name = value.name or ""
        if name in self.facts.shapes:
            return self.facts.shapes[name]
        tensor = self.constant(value)
        return tuple(tensor.shape) if tensor is not None else ()

    def size(self, value: ir.Value) -> Any:
        """The one item of shape arithmetic, symbolic or not, else None."""
        number = self.scalar(value)
        return int(number) if number is not None else self.facts.sizes.get(value.name or "")

    def operands(self, node: ir.Node) -> tuple[tuple[ir.Value, ir.Value], ...]:
        """The inputs of a two-input node in both orders."""
        a, b = node.inputs[0], node.inputs[1]
        return ((a, b), (b, a)) if a is not None and b is not None else ()

    def attribute(self, node: ir.Node, name: str, default: Any = None) -> Any:
        found = node.attributes.get(name)
        return default if found is None else found.value

    def emit(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        shape: tuple[Any, ...],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node in front of another one, with that one's origin; gives its output."""
        node = ir.node(
            op,
            inputs,
            attributes,
            domain=domain,
            name=before.name,
            metadata_props=dict(before.metadata_props),
        )
        self.graph.insert_before(before, node)
        output = node.outputs[0]
        output.name = f"{before.outputs[0].name}/{op}/{len(self.facts.shapes)}"
        self.facts.shapes[output.name] = shape
        return output

    def literal(self, tensor: torch.Tensor, name: str) -> ir.Value:
        """A new constant."""
        while name in self.facts.constants or name in self.facts.shapes:
            name += "_"
        self.facts.constants[name] = tensor
        return ir.Value(name=name)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of ``old``, and the graph's outputs, take ``new`` instead."""
        old.replace_all_uses_with(new, replace_graph_outputs=True)
