"""The part of a block in which fewer tokens may run without anyone outside knowing: its self-attention.

A span begins at the tensor ``[B, N, C]`` that queries, keys and values are projected from and ends at the
last tensor ``[B, N, C]`` that the attention alone leads to: behind the output projection, before the
residual add or before windows are put back on their grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.attention import SDPA, Attention
from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.cost import node_cost, token_degree
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.residual import NORMS
from thresher.compiler.analysis.sites import TOKEN_AXIS, Sites
from thresher.compiler.program import Program, Refusal, module_path


@dataclass(frozen=True)
class AttentionSpan:
    """Self-attention ``layer`` of a network.

    Attributes:
        before, behind: the tensors ``[B, N, C]`` at which tokens may leave and have to be back.
        compared: the residual stream there, or ``before`` itself where windows were cut before.
        inner: nodes from ``before`` (not included) to ``behind`` (included) that hold tensors.
        sites: what is known of the axis that its tokens run over.
    """

    layer: int
    path: str
    before: fx.Node
    behind: fx.Node
    compared: fx.Node
    inner: frozenset[fx.Node]
    sites: Sites

    @property
    def tokens(self) -> int:
        """Tokens that it attends over, as traced."""
        return hint_of(self.before.meta["val"].shape[TOKEN_AXIS])

    def macs(self, left: int) -> float:
        """Multiply-accumulates of one item when so many tokens run through it."""
        share = left / self.tokens
        calls = (node for node in self.inner if node.op == "call_function")
        return sum(node_cost(n).macs * share ** token_degree(self.sites, n) for n in calls)


def find_attention_spans(program: Program) -> tuple[list[AttentionSpan], list[Refusal]]:
    """All spans in program order, numbered by their self-attentions, and why the others are none."""
    nodes = [n for n in program.graph.nodes if n.target is SDPA]
    known = find_sites(program)
    if not nodes:
        return [], known.refusals
    axes, flow = known.axes, dataflow(program.graph)
    found, refused = list[AttentionSpan](), list[Refusal]()
    selves = [Attention(n) for n in nodes if axes.of(n.args[0])[-2] == axes.of(n.args[1])[-2]]
    stream = _stream(flow, selves)
    for layer, attention in enumerate(selves):
        made = _span(flow, stream, _over(known, attention), attention, layer)
        if isinstance(made, AttentionSpan):
            found.append(made)
        else:
            where = module_path(attention.node) or "top level"
            refused.append(replace(made, reason=f"attention in {where} {made.reason}"))
    if not selves:
        why = "attends to other tokens than those of its own block: a cache, or another sequence"
        refused.append(Refusal(nodes[0].name, why))
    return found, refused


def advice(program: Program) -> list[Refusal]:
    """What can be done where no token may leave for good."""
    spans, _ = find_attention_spans(program)
    why = (
        f"the token count outside of {len(spans)} attentions has to stay: use tomesd, which merges before"
        " an attention and puts tokens back behind it"
    )
    return [Refusal(spans[0].behind.name, why)] if spans else []


def _stream(flow: nx.DiGraph[fx.Node], attentions: Sequence[Attention]) -> set[fx.Node]:
    """What tokens are computed from and what is computed of them; masks and position tables are not among it."""
    first = next((a.input for a in attentions if a.input is not None), None)
    return (
        set()
        if first is None
        else nx.ancestors(flow, first) | nx.descendants(flow, first) | {first}
    )


def _over(known: Sites, attention: Attention) -> Sites:
    """The facts for the axis of one attention: those of the blocks, or of windows of their own."""
    variable = known.axes.of(attention.q)[-2]
    if known.root is not None and variable == known.token:
        return known
    own = Sites(known.axes, token=variable, root=known.root or attention.input)
    prefix = [-offset for offset in own.offsets.values() if offset < 0]
    return replace(own, protected=max(prefix, default=0))


def _span(
    flow: nx.DiGraph[fx.Node],
    stream: set[fx.Node],
    sites: Sites,
    attention: Attention,
    layer: int,
) -> AttentionSpan | Refusal:
    node, before = attention.node, attention.input
    if any(use.node is node and use.kind == "mix" for use in sites.axes.uses):
        return Refusal(node.name, "is causal: later tokens depend on the order of earlier ones")
    if before is None or sites.token_axes(before) != {TOKEN_AXIS: 0}:
        why = "has no one tensor [batch, token, channel] that queries, keys and values are projected from"
        return Refusal(node.name, f"{why}: they come from a grid, or from several tensors")
    behind = _end(sites, stream & (nx.ancestors(flow, before) | {before}), node)
    if behind is None:
        return Refusal(node.name, "leads to no tensor [batch, token, channel] before it is read")
    between = nx.descendants(flow, before) & (nx.ancestors(flow, behind) | {behind})
    inner = frozenset(filter(_is_tensor, between))
    compared = _stream_at(sites, before)
    span = AttentionSpan(layer, module_path(node), before, behind, compared, inner, sites)
    return _objection(stream - inner - {before}, span) or span


def _stream_at(sites: Sites, before: fx.Node) -> fx.Node:
    """What a norm reads, if that goes on past it as the residual stream, or else the tensor itself."""
    if before.target not in NORMS:
        return before
    read = before.all_input_nodes[0]
    goes_on = len([user for user in read.users if _is_tensor(user)]) > 1
    return read if goes_on and sites.token_axes(read) == {TOKEN_AXIS: 0} else before


def _end(sites: Sites, outside: set[fx.Node], attention: fx.Node) -> fx.Node | None:
    """The last tensor ``[B, N, C]`` on the only way from an attention that joins no tokens from outside."""
    end, node = None, attention
    while len(users := [user for user in node.users if _is_tensor(user)]) == 1:
        (node,) = users
        if not sites.carries_tokens(node):
            break
        if any(n in outside and sites.carries_tokens(n) for n in node.all_input_nodes):
            break
        if node.meta["val"].dim() == 3 and sites.token_axes(node) == {TOKEN_AXIS: 0}:
            end = node
    return end


def _objection(outside: set[fx.Node], span: AttentionSpan) -> Refusal | None:
    """Why fewer tokens cannot run through a span."""
    sites, inner = span.sites, span.inner
    for use in sites.axes.uses:
        within = use.node in inner and use.operand in inner | {span.before}
        mixes = use.kind == "mix" and use.node.target is not SDPA
        if within and mixes and use.axis in sites.token_axes(use.operand):
            return Refusal(use.node.name, f"needs every token in place: {use.node.name} {use.why}")
    prefix = {
        use.node for use in sites.axes.uses if use.kind == "head" and use.index <= sites.protected
    }
    for node in (n for n in span.before.graph.nodes if n in inner and n not in prefix):
        joined = [n for n in node.all_input_nodes if n in outside and sites.carries_tokens(n)]
        if joined:
            return Refusal(node.name, f"reads {joined[0].name} from outside at {node.name}")
        if not _runs_over_tokens(sites, node):
            return Refusal(
                node.name, f"needs every token in place: {node.name} lays them out on a grid"
            )
        table = next((n for n in node.all_input_nodes if _is_folded(span, n, node)), None)
        if table is not None:
            why = f"reads {table.name} where windows or heads are folded into the batch, at {node.name}"
            return Refusal(node.name, why)
        strangers = [u for u in node.users if u not in inner and _is_tensor(u)]
        if node is not span.behind and strangers:
            return Refusal(node.name, f"is read inside: {node.name} goes to {strangers[0].name}")
    return None


def _runs_over_tokens(sites: Sites, node: fx.Node) -> bool:
    """Whether an axis of a node is the tokens, or holds them beside another."""
    forms = sites.axes.variables
    held = (forms.factors(v) or () for tensor in sites.axes.tensors(node) for v in tensor)
    return sites.carries_tokens(node) or any(f in sites.offsets for fs in held for f in fs)


def _is_folded(span: AttentionSpan, table: fx.Node, user: fx.Node) -> bool:
    """Whether side information meets tokens whose rows are not the batch's, and so cannot follow them."""
    sites = span.sites
    if table in span.inner or table is span.before or not sites.carries_tokens(table):
        return False
    batch = sites.axes.of(span.before)[0]
    rows = [sites.axes.of(user)[0]]
    if table.meta["val"].dim() == user.meta["val"].dim() and table.meta["val"].shape[0] != 1:
        rows.append(sites.axes.of(table)[0])
    return any(row != batch for row in rows)


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node yields tensors and not a size or, like a check, nothing."""
    return node.op == "output" or isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
