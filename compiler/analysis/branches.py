"""Residual branches by data flow: what every block adds to the residual stream.

A *branch* is ``out = skip + f(skip)``, with a LayerNorm over the sum in post-norm models.  A *block* is
an attention branch and what follows up to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.attention import SDPA, SOFTMAX
from thresher.compiler.analysis.cost import node_cost
from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.residual import NORMS, summands
from thresher.compiler.program import Program, module_path

aten = torch.ops.aten
_ATTENDS = (SDPA, *SOFTMAX)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.convolution.default)


@dataclass(frozen=True)
class Branch:
    """One branch of block ``layer``: ``"attention"`` where tokens attend in it, else ``"ffn"``.

    ``skip`` and ``out`` are the residual stream before and behind it, of one shape.
    """

    layer: int
    kind: str
    skip: fx.Node
    out: fx.Node


@dataclass(frozen=True)
class Part:
    """Branches that are left out or run together: a block (``"3"``) or one kind of it (``"3.ffn"``)."""

    name: str
    path: str
    branches: tuple[Branch, ...]

    @property
    def spans(self) -> list[tuple[fx.Node, fx.Node]]:
        """The stream before and behind each run of branches that follow one another directly."""
        found: list[tuple[fx.Node, fx.Node]] = []
        for branch in self.branches:
            if found and found[-1][1] is branch.skip:
                found[-1] = (found[-1][0], branch.out)
            else:
                found.append((branch.skip, branch.out))
        return found


def find_branches(program: Program) -> list[Branch]:
    """All branches in program order; never raises.

    Sums that close a loop round other branches (a long skip connection) are none, nor are
    those that only add a convolution (of positions, say).
    """
    flow = dataflow(program.graph)
    found: list[tuple[fx.Node, fx.Node, set[fx.Node]]] = []
    for node in program.graph.nodes:
        made = _branch(flow, node, [skip for skip, _, _ in found], [add for _, add, _ in found])
        if made is not None:
            found.append((made[0], node, made[1]))
    norms = [_only_norm(add) for _, add, _ in found]
    post = len(found) > 1 and None not in norms
    branches, layer = list[Branch](), -1
    for (skip, add, own), norm in zip(found, norms, strict=True):
        attends = any(n.target in _ATTENDS for n in own)
        layer += attends or layer < 0
        out = norm if post and norm is not None else add
        branches.append(Branch(layer, "attention" if attends else "ffn", skip, out))
    return branches


def blocks(branches: Sequence[Branch]) -> list[Part]:
    """Whole blocks, named by their numbers."""
    return _parts(branches, lambda branch: str(branch.layer))


def halves(branches: Sequence[Branch]) -> list[Part]:
    """Attention and feed-forward parts of blocks, named ``"3.attention"``, ``"3.ffn"``."""
    return _parts(branches, lambda branch: f"{branch.layer}.{branch.kind}")


def live_nodes(program: Program, gone: Iterable[Branch] = ()) -> set[fx.Node]:
    """Nodes that the outputs need when some branches are left out."""
    instead = {branch.out: branch.skip for branch in gone}
    frontier, live = list(program.output_nodes()), set[fx.Node]()
    while frontier:
        node = frontier.pop()
        if node not in live:
            live.add(node)
            frontier += [instead[node]] if node in instead else node.all_input_nodes
    return live


def live_macs(program: Program, gone: Iterable[Branch] = ()) -> int:
    """Multiply-accumulates of one item when some branches are left out."""
    removed = list(gone)
    outs = {branch.out for branch in removed}
    live = live_nodes(program, removed) - outs
    return sum(node_cost(node).macs for node in live if node.op == "call_function")


def _parts(branches: Sequence[Branch], name: Callable[[Branch], str]) -> list[Part]:
    named: dict[str, list[Branch]] = {}
    for branch in branches:
        named.setdefault(name(branch), []).append(branch)
    return [Part(key, module_path(m[-1].out), tuple(m)) for key, m in named.items()]


def _branch(
    flow: nx.DiGraph[fx.Node], node: fx.Node, skips: list[fx.Node], adds: list[fx.Node]
) -> tuple[fx.Node, set[fx.Node]] | None:
    """The stream before a sum and the nodes of its branch alone, or None."""
    operands = summands(node)
    if not operands or node.kwargs:
        return None
    for skip, result in (operands, operands[::-1]):
        if not _is_stream(skip, node):
            continue
        reads = nx.ancestors(flow, result) | {result}
        beside = any(skip is add for add in adds) and bool(reads.intersection(skips))
        if skip not in reads and not beside:
            continue
        before = nx.ancestors(flow, skip) | {skip}
        own = reads - before
        if not own.intersection(adds) and any(map(_multiplies, own)):
            return skip, own
    return None


def _is_stream(skip: fx.Node, total: fx.Node) -> bool:
    """Whether a tensor ``[B, ..., C]`` may be the stream before a sum."""
    before, behind = skip.meta.get("val"), total.meta["val"]
    return (
        isinstance(before, torch.Tensor)
        and skip.op != "placeholder"
        and behind.dim() >= 3
        and behind.is_floating_point()
        and [str(n) for n in before.shape] == [str(n) for n in behind.shape]
    )


def _multiplies(node: fx.Node) -> bool:
    is_call = node.op == "call_function" and node.target not in _CONVOLUTIONS
    return is_call and node_cost(node).macs > 0


def _only_norm(add: fx.Node) -> fx.Node | None:
    """The norm that alone reads a sum."""
    users = [user for user in add.users if user.target is not aten.sym_size.int]
    return users[0] if len(users) == 1 and users[0].target in NORMS else None
