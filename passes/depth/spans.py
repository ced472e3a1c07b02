"""Parts of a network that some of the tokens may skip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.attention import SDPA
from thresher.compiler.analysis.branches import Part
from thresher.compiler.analysis.cost import node_cost, token_degree
from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.sites import TOKEN_AXIS, Sites
from thresher.compiler.program import Program, Refusal


@dataclass(frozen=True)
class Span:
    """The stream before and behind a part, and the nodes between, ``behind`` included."""

    part: Part
    before: fx.Node
    behind: fx.Node
    inner: frozenset[fx.Node]

    @property
    def layer(self) -> int:
        return self.part.branches[0].layer

    def macs(self, sites: Sites, share: float) -> float:
        """Multiply-accumulates of one item when a share of the tokens runs through it."""
        calls = (node for node in self.inner if node.op == "call_function")
        return sum(node_cost(n).macs * share ** token_degree(sites, n) for n in calls)


def find_spans(
    program: Program, sites: Sites, parts: Sequence[Part]
) -> tuple[list[Span], list[Refusal]]:
    """Parts of which every node takes fewer tokens as they are, and why the others do not."""
    flow = dataflow(program.graph)
    found, refused = list[Span](), list[Refusal]()
    for part in parts:
        before, behind = part.spans[0][0], part.spans[-1][1]
        inner = nx.descendants(flow, before) & (nx.ancestors(flow, behind) | {behind})
        span = Span(part, before, behind, frozenset(inner))
        why = _objection(sites, span)
        if why is None:
            found.append(span)
        else:
            refused.append(Refusal(behind.name, f"block {part.name} {why}"))
    return found, refused


def _objection(sites: Sites, span: Span) -> str | None:
    if len(span.part.spans) > 1 or span.before.meta["val"].dim() != 3:
        return "is no single stretch of the residual stream [B, N, C]"
    if sites.token_axes(span.before) != {TOKEN_AXIS: 0}:
        return "has other tokens than most blocks: windows, or some that were reduced before"
    return _needs_all(sites, span) or _read_inside(sites, span)


def _needs_all(sites: Sites, span: Span) -> str | None:
    """Whether something in a span needs every token in its place."""
    streams = {site.stream for site in sites.sites}
    for branch in span.part.branches:
        if branch.kind == "attention" and branch.out not in streams:
            why = {refusal.node: refusal.reason for refusal in sites.refusals}
            places = [n for n in span.inner if n.target is SDPA or n is branch.out]
            known = [why[node.name] for node in places if node.name in why]
            return f"needs every token: {known[0] if known else 'its attention is not known'}"
    for use in sites.axes.uses:
        within = use.node in span.inner and use.operand in span.inner | {span.before}
        mixes = use.kind == "mix" and use.node.target is not SDPA
        if within and mixes and use.axis in sites.token_axes(use.operand):
            return f"needs every token: {use.node.name} {use.why}"
    return None


def _read_inside(sites: Sites, span: Span) -> str | None:
    """Whether anything outside of a span reads values that depend on which tokens run through it."""
    partial = {span.before}
    for node in span.before.graph.nodes:
        if node is span.behind:
            partial.discard(span.before)  # from here on it is the whole stream again
            continue
        sources = [n for n in node.all_input_nodes if n in partial]
        read = next((n for n in sources if not _reads_prefix(sites, node, n)), None)
        if read is None:
            continue
        if node not in span.inner and not _takes_all(node):
            return f"is read inside: {read.name} goes to {node.name}"
        partial.add(node)
    return None


def _takes_all(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out, such as the first of ``x[:, 0]``: it reads nothing yet."""
    return (
        node.target is torch.ops.aten.slice.Tensor
        and node.meta["val"].shape == node.all_input_nodes[0].meta["val"].shape
    )


def _reads_prefix(sites: Sites, reader: fx.Node, operand: fx.Node) -> bool:
    """Whether a node reads no tokens of an operand but protected ones, which always run."""
    axes = sites.token_axes(operand)
    if reader.target is torch.ops.aten.sym_size.int:
        return reader.args[1] not in axes
    behind = [
        use.index + (use.kind == "read") - axes[use.axis]
        if use.kind in ("read", "head")
        else math.inf
        for use in sites.axes.uses
        if use.node is reader and use.operand is operand and use.axis in axes
    ]
    return bool(behind) and max(behind) <= sites.protected
