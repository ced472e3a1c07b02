"""A graph's data flow as a networkx graph."""

from __future__ import annotations

import networkx as nx
from torch import Tensor, fx

from thresher.compiler.program import Program


def dataflow(graph: fx.Graph) -> nx.DiGraph[fx.Node]:
    """The graph's data flow, nodes in program order."""
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((operand, node) for operand in node.all_input_nodes)
    return flow


def fed(program: Program) -> set[fx.Node]:
    """Nodes whose values, and not only shapes, depend on an input; the inputs are among them."""
    found = set(program.input_nodes())
    for node in program.graph.nodes:
        shaped = isinstance(node.meta.get("val"), (Tensor, tuple, list))
        if shaped and any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def origin(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The calls that a node's value comes from, in program order; none if it is an input."""
    needed = nx.ancestors(dataflow(graph), node) | {node}
    return [n for n in graph.nodes if n in needed and n.op == "call_function"]
