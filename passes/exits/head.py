"""The head of an early exit: the model's own, on an earlier tensor and with weights of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.linears import stored_values
from thresher.compiler.program import Program, Refusal
from thresher.compiler.surgery import Rewriter


@dataclass(frozen=True)
class Head:
    """What stands between the last block and the output.

    Attributes:
        stream: what it reads, ``[B, N, D]`` or alike.
        nodes: in order; the last of them is the output.
        weights: placeholders that it reads, with what is stored for them.
    """

    stream: fx.Node
    nodes: Sequence[fx.Node]
    weights: Mapping[fx.Node, Tensor]


def find_head(program: Program, stream: fx.Node, early: fx.Node) -> Head | Refusal:
    """The head behind ``stream``, or why it cannot stand behind ``early`` too."""
    (output,) = program.output_nodes()
    flow = dataflow(program.graph)
    behind: set[fx.Node] = nx.descendants(flow, stream)
    before: set[fx.Node] = nx.ancestors(flow, output)
    inside = (behind & before) | {output}
    nodes = [node for node in program.graph.nodes if node in inside]
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    stored, weights = stored_values(program), dict[fx.Node, Tensor]()
    for node in nodes:
        for read in node.all_input_nodes:
            if read in stored:
                weights[read] = stored[read]
            elif read is not stream and read not in inside and order[read] > order[early]:
                return Refusal(
                    node.name,
                    f"the model's head also reads {read.name}, which the exit does not have",
                )
    return Head(stream, nodes, weights)


class HeadForward(fx.Interpreter):
    """Runs a Program and, on the tensor ``early``, its head with other weights."""

    def __init__(self, program: Program, head: Head, early: fx.Node) -> None:
        super().__init__(program.exported.graph_module)
        self.program, self.head, self.early = program, head, early
        self._beside = {read for node in head.nodes for read in node.all_input_nodes} - {
            head.stream,
            *head.nodes,
            *head.weights,
        }
        self._kept: dict[fx.Node, object] = {}

    def seen(self, inputs: Mapping[str, Tensor]) -> tuple[dict[fx.Node, object], Tensor]:
        """What an early head reads, and the dense model's output; no gradients."""
        self._kept = {}
        with torch.no_grad():
            (output,) = self.run(*self.program.placeholder_values(inputs))
        return self._kept, output

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n is self.early or n in self._beside:
            self._kept[n] = value
        return value

    def early_output(
        self, seen: Mapping[fx.Node, object], weights: Mapping[fx.Node, Tensor]
    ) -> Tensor:
        """The head's output on what :meth:`seen` gave, with gradients of its weights."""
        values: dict[fx.Node, Any] = {**seen, **weights, self.head.stream: seen[self.early]}
        for node in self.head.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        result = values[self.head.nodes[-1]]
        assert isinstance(result, Tensor)
        return result


def write_head(
    rewriter: Rewriter, head: Head, early: fx.Node, weights: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """Emit the head on ``early``, a node of the old graph, with other weights; returns its output."""
    made = {**weights, head.stream: rewriter.map[early]}
    for node in head.nodes:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: made[n] if n in made else rewriter.map[n]
        )
        made[node] = rewriter.emit(node.target, *args, **kwargs)  # type: ignore[arg-type]
    return made[head.nodes[-1]]
