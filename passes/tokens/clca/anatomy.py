"""What there is to know of a Program that tokens were taken from: its blocks, its steps, its class token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.axes import infer
from thresher.compiler.analysis.branches import blocks, find_branches
from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.sites import TOKEN_AXIS, Sites
from thresher.compiler.program import LedgerEntry, Program, Refusal, provenance
from thresher.passes.exits.head import find_head


@dataclass(frozen=True)
class Step:
    """The nodes of one reduction.

    Attributes:
        nodes: in order.
        before, stream: residual stream ``[B, N, C]`` that comes in, and that leaves.
        sizes: ``[B, N]``, what else leaves.
        left: how many tokens leave.
    """

    entry: LedgerEntry
    nodes: Sequence[fx.Node]
    before: fx.Node
    stream: fx.Node
    sizes: Sequence[fx.Node]
    left: int

    @property
    def last(self) -> fx.Node:
        """The last node in the order of the graph."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Anatomy:
    """A reduced Program.

    Attributes:
        starts: the stream that each block reads.
        last: the stream behind the last block.
        steps: reductions in order.
        class_token: index of the token that is read out.
        whole: how many tokens the first block reads.
    """

    sites: Sites
    starts: Sequence[fx.Node]
    last: fx.Node
    steps: Sequence[Step]
    class_token: int
    whole: int

    @cached_property
    def step_of(self) -> Mapping[fx.Node, Step]:
        """The reduction that a node belongs to."""
        return {node: step for step in self.steps for node in step.nodes}

    @cached_property
    def reduced(self) -> frozenset[int]:
        """Blocks at which tokens leave."""
        return frozenset(step.entry.layer for step in self.steps)

    @property
    def read(self) -> list[int]:
        """Blocks behind which the class token is read out: those, and the last."""
        return sorted(self.reduced | {len(self.starts) - 1})

    def segment(self, stream: fx.Node) -> Sites:
        """The token axis between two reductions, by a tensor ``[B, N, C]`` there."""
        return replace(self.sites, token=self.sites.axes.of(stream)[TOKEN_AXIS])

    @cached_property
    def _segments(self) -> Sequence[Sites]:
        return [self.segment(node) for node in (self.starts[0], *(s.stream for s in self.steps))]

    def carries_tokens(self, node: fx.Node) -> bool:
        """Whether a node yields a tensor that runs over the tokens of any segment."""
        return any(sites.carries_tokens(node) for sites in self._segments)


def read(program: Program) -> Anatomy | Refusal:
    """The anatomy of a reduced Program that reads out one class token, or why it is none."""
    outputs = program.output_nodes()
    if not program.ledger:
        return Refusal("(graph)", "no tokens were taken from this model, so none are missed: put evit, tome or another"
                       " token reduction before it")  # fmt: skip
    if len(outputs) != 1 or outputs[0].meta["val"].dim() != 2:
        return Refusal(
            "(graph)", "the model does not answer with one vector of classes for each item"
        )
    parts = blocks(find_branches(program))
    if len(parts) < 2:
        return Refusal("(graph)", "the model has no two blocks to carry anything between")
    steps = []
    for entry in program.ledger:
        step = _step(program, entry)
        if isinstance(step, Refusal):
            return step
        steps.append(step)
    sites = Sites(infer(program.graph))
    starts, last = [part.spans[0][0] for part in parts], parts[-1].spans[-1][1]
    found = Anatomy(sites, starts, last, steps, 0, int(steps[0].entry.tokens_in))
    index = _class_token(program, found)
    return index if isinstance(index, Refusal) else replace(found, class_token=index)


def _step(program: Program, entry: LedgerEntry) -> Step | Refusal:
    if not isinstance(entry.tokens_in, int) or not isinstance(entry.tokens_out, int):
        return Refusal(
            entry.node,
            "the number of tokens is not fixed, so there is no number of those to append either",
        )
    key = (entry.method, entry.layer)
    nodes = [n for n in program.graph.nodes if _made(n) == key]
    again = [e for e in program.ledger if (e.method, e.layer) == key]
    if len(again) > 1 or entry.node not in {node.name for node in nodes}:
        return Refusal(entry.node, "it is not known which nodes belong to this reduction")
    inside = set(nodes)
    leaving = [n for n in nodes if not inside.issuperset(n.users)]
    streams = [n for n in leaving if _is_float(n, 3)]
    sizes = [n for n in leaving if _is_float(n, 2)]
    other = [n for n in leaving if n not in streams and n not in sizes]
    if other or len(streams) != 1:
        return Refusal(
            (other or streams or nodes)[0].name,
            "places of tokens are read behind the reduction, as rotary positions, masks and restored outputs do, and"
            " an appended token has no place",
        )
    (operation,) = (node for node in nodes if node.name == entry.node)
    before = operation.args[0]
    assert isinstance(before, fx.Node)
    return Step(entry, nodes, before, streams[0], sizes, entry.tokens_out)


def _made(node: fx.Node) -> tuple[object, object]:
    """The method and the block that a node was made by and for."""
    note = provenance(node)
    return note.get("pass"), note.get("site")


def _is_float(node: fx.Node, rank: int) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == rank


def _class_token(program: Program, found: Anatomy) -> int | Refusal:
    """The one token that the head reads."""
    segment = found.segment(found.last)
    behind: Iterable[fx.Node] = nx.descendants(dataflow(program.graph), found.last) | {found.last}
    variables, read = segment.axes.variables, set[int]()
    for use in segment.axes.uses:
        if use.operand not in behind:
            continue
        offset = segment.offsets.get(variables.find(segment.axes.of(use.operand)[use.axis]))
        if offset is None:
            continue
        if use.kind != "read" or offset:
            return Refusal(
                use.node.name, "the model reads out more of its tokens than a class token"
            )
        read.add(use.index)
    if len(read) != 1:
        return Refusal(found.last.name, "the model reads out no class token, or several")
    head = find_head(program, found.last, found.last)
    if isinstance(head, Refusal):
        return Refusal(
            head.node, "the model's head reads more than a class token, and another would not"
        )
    return read.pop()
