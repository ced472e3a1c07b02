"""Where activation sparsity can be used: feed-forward networks and the linears of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from thresher.compiler.analysis import ffn as networks
from thresher.compiler.analysis.attention import SDPA
from thresher.compiler.analysis.ffn import FFN, refuse
from thresher.compiler.analysis.linears import LINEAR, Names, operand, stored_weights
from thresher.compiler.program import Program, Refusal


@dataclass(frozen=True)
class Input:
    """A tensor that one or several linears read.

    ``kind``: ``"qkv"``, ``"out"`` (of attention), ``"up"`` or ``"down"``.
    """

    kind: str
    layer: int
    node: fx.Node
    linears: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"

    @property
    def width(self) -> int:
        return int(self.node.meta["val"].shape[-1])

    @property
    def weights(self) -> int:
        """Entries of the matrices that read this tensor."""
        return sum(operand(linear, 1).meta["val"].numel() for linear in self.linears)


@dataclass
class Found(networks.Found):
    """Networks, and inputs of linears; inputs of one name are refused, and ``alike`` are these refusals alone."""

    inputs: list[Input] = field(default_factory=list)
    alike: list[Refusal] = field(default_factory=list)


def find(program: Program) -> Found:
    """Search a Program; never raises."""
    found = networks.find(program)
    inputs, alike = _told_apart(_inputs(program.graph, found.ffns, stored_weights(program)))
    return Found(found.ffns, [*found.refusals, *alike], inputs, alike)


def _inputs(graph: fx.Graph, ffns: list[FFN], stored: Names) -> Iterator[Input]:
    """Inputs of known kinds in program order; blocks are counted by their attention."""
    ups = {linear: ffn.layer for ffn in ffns for linear in ffn.linears}
    downs = {ffn.down: ffn.layer for ffn in ffns}
    attentions = {n: i for i, n in enumerate(n for n in graph.nodes if n.target is SDPA)}
    groups: dict[tuple[fx.Node, str, int], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is not LINEAR or operand(node, 1) not in stored:
            continue
        if node in ups:
            kind, layer = "up", ups[node]
        elif node in downs:
            kind, layer = "down", downs[node]
        elif (into := _reaches(node, attentions, backward=False)) is not None:
            kind, layer = "qkv", attentions[into]
        elif (out_of := _reaches(node, attentions, backward=True)) is not None:
            kind, layer = "out", attentions[out_of]
        else:
            continue
        groups.setdefault((operand(node, 0), kind, layer), []).append(node)
    for (node, kind, layer), linears in groups.items():
        yield Input(kind, layer, node, tuple(linears))


def _told_apart(inputs: Iterator[Input]) -> tuple[list[Input], list[Refusal]]:
    """Inputs whose names are their own; those that share one are refused."""
    named: dict[str, list[Input]] = {}
    for entry in inputs:
        named.setdefault(entry.name, []).append(entry)
    refused = [
        refuse(entry.linears[0], f"is one of {len(group)} places that would be called {name}")
        for name, group in named.items()
        if len(group) > 1
        for entry in group
    ]
    return [group[0] for group in named.values() if len(group) == 1], refused


def _reaches(linear: fx.Node, attentions: dict[fx.Node, int], *, backward: bool) -> fx.Node | None:
    """The first attention before or behind a linear, with no other linear in between.

    Operators of ours end the way, as behind a merge is another block, and so does a mask.
    """
    stack, seen = [linear], set[fx.Node]()
    while stack:
        node = stack.pop()
        for near in node.all_input_nodes if backward else node.users:
            if near in attentions:
                if backward or node in near.args[:3]:
                    return near
            elif near not in seen and near.target is not LINEAR and not _ours(near):
                seen.add(near)
                stack.append(near)
    return None


def _ours(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and str(schema.name).startswith("thresher::")
