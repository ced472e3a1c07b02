"""Parts of a network that some of the tokens may skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from thresher.compiler.analysis.branches import Part
from thresher.compiler.analysis.cost import node_cost, token_degree
from thresher.compiler.analysis.sites import SDPA, TOKEN_AXIS, Sites, dataflow
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
    value = span.before.meta["val"]
    if len(span.part.spans) > 1 or value.dim() != 3:
        return "is no single stretch of the residual stream [B, N, C]"
    if sites.token_axes(span.before) != {TOKEN_AXIS: 0}:
        return (
            "runs over another token axis than most blocks: put this pass before other token passes"
        )
    streams = {site.stream for site in sites.sites}
    for branch in span.part.branches:
        if branch.kind == "attention" and branch.out not in streams:
            reasons = {refusal.node: refusal.reason for refusal in sites.refusals}
            attentions = [n for n in span.inner if n.target is SDPA]
            known = [reasons[n.name] for n in [*attentions, branch.out] if n.name in reasons]
            return (
                f"needs every token: {known[0] if known else 'its attention is none that is known'}"
            )
    for use in sites.axes.uses:
        ours = use.node in span.inner and use.operand in span.inner | {span.before}
        if (
            ours
            and use.kind == "mix"
            and use.node.target is not SDPA
            and use.axis in sites.token_axes(use.operand)
        ):
            return f"needs every token: {use.node.name} {use.why}"
    for node in span.inner - {span.behind}:
        outside = [u for u in node.users if u not in span.inner and sites.carries_tokens(u)]
        if outside or any(u.op == "output" for u in node.users):
            return f"is read inside: {node.name} goes to {[*outside, 'the outputs'][0]}"
    return None
