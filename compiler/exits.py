"""Programs that some items leave early: one graph that says what is computed, two that a host runs.

The whole graph ends in ``where(leaves, early, late)``, so it is a model like any other and the reference of
what is cut from it.  *First* computes what early items need, and hands on what *rest* reads of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.errors import RefusedError
from thresher.compiler.handed import HANDED, LEAVES
from thresher.compiler.program import Program, provenance
from thresher.compiler.surgery import Rewriter

EXIT = "exit"  # noted on the node that joins what left early with the rest


@dataclass(frozen=True)
class Halves:
    """The graphs of a Program with an exit.

    ``first`` gives the answers of those that leave under the Program's own name of the output,
    :data:`LEAVES`, and what it hands on; ``rest`` takes the Program's inputs and that, for the others only.
    """

    first: Program
    rest: Program


def joined(program: Program) -> fx.Node | None:
    """The node ``where(leaves[:, None], early, late)`` of a Program with an exit, else None."""
    found = (node for node in program.graph.nodes if provenance(node).get(EXIT))
    return next(found, None)


def halves(program: Program) -> Halves:
    """Cut a Program with an exit in two.

    What depends on no item (sizes, tables) is computed in both, as the rest gets fewer items.

    Raises:
        RefusedError: the rest reads a tensor of the first that has no axis of items.
    """
    join = joined(program)
    assert join is not None
    column, early, late = (node for node in join.args if isinstance(node, fx.Node))
    leaves = column.all_input_nodes[0]
    flow = dataflow(program.graph)
    before = nx.ancestors(flow, early) | nx.ancestors(flow, leaves) | {early, leaves}
    behind = (nx.ancestors(flow, late) | {late}) - before
    sizes = _of_no_item(program, before, behind)
    handed = [
        node
        for node in program.graph.nodes
        if node in before
        and node.op == "call_function"
        and node not in sizes
        and not behind.isdisjoint(node.users)
    ]
    _demand_items(handed, early)
    (name,) = (spec.name for spec in program.outputs)
    given = tuple(name for name, _ in program.named_inputs())
    names = tuple(f"{HANDED}{index}" for index in range(len(handed)))

    rewriter = Rewriter(program, EXIT)
    for node in program.graph.nodes:
        if node.op == "placeholder" or node in before:
            rewriter.copy(node)
    outputs = [rewriter.map[node] for node in (early, leaves, *handed)]
    exported = rewriter.finish(outputs, dropped=_unread(program, before))
    first = _half(program, exported, (name, LEAVES, *names))

    rewriter, last, made = Rewriter(program, EXIT), program.input_nodes()[-1], list[fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder" or node in behind or node in sizes:
            rewriter.copy(node)
        if node is last:
            for source, called in zip(handed, names, strict=True):
                value = source.meta["val"]
                place = rewriter.input(called.replace(".", "_"), value.shape, value.dtype)
                rewriter.map[source] = place
                made.append(place)
    exported = rewriter.finish(
        [rewriter.map[late]], dropped=_unread(program, behind | sizes), inputs=made
    )
    return Halves(first, _half(program, exported, (name,), (*given, *names)))


def _half(
    program: Program,
    exported: torch.export.ExportedProgram,
    outputs: tuple[str, ...],
    inputs: tuple[str, ...] = (),
) -> Program:
    """A part of a Program, with as much of its ledger as it holds."""
    held = {node.name for node in exported.graph.nodes}
    ledger = tuple(entry for entry in program.ledger if entry.node in held)
    return dataclasses.replace(
        program, exported=exported, ledger=ledger, output_names=outputs,
        input_names=inputs or program.input_names,
    )  # fmt: skip


def _of_no_item(program: Program, before: set[fx.Node], behind: set[fx.Node]) -> set[fx.Node]:
    """What the rest reads of the first that comes of weights and sizes alone, with all it is made of."""
    inputs, plain = set(program.input_nodes()), set[fx.Node]()
    for node in program.graph.nodes:
        data = [n for n in node.all_input_nodes if n in inputs]
        made = [n for n in node.all_input_nodes if n.op == "call_function"]
        fixed = not data or node.target is torch.ops.aten.sym_size.int
        if node.op == "call_function" and fixed and plain.issuperset(made):
            plain.add(node)
    wanted = {node for node in plain & before if not behind.isdisjoint(node.users)}
    frontier = list(wanted)
    while frontier:
        more = {n for n in frontier.pop().all_input_nodes if n in plain} - wanted
        wanted |= more
        frontier += more
    return wanted


def _demand_items(handed: list[fx.Node], early: fx.Node) -> None:
    items = early.meta["val"].shape[0]
    for node in handed:
        value = node.meta["val"]
        if (
            not isinstance(value, torch.Tensor)
            or not value.dim()
            or str(value.shape[0]) != str(items)
        ):
            raise RefusedError(
                f"{node.name} is read behind the exit and has no axis of items, so the graph cannot be cut"
                " there: choose another block"
            )


def _unread(program: Program, kept: set[fx.Node]) -> frozenset[str]:
    """Weights that none of the nodes that stay reads."""
    inputs = set(program.input_nodes())
    return frozenset(
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and node not in inputs and kept.isdisjoint(node.users)
    )
