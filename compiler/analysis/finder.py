"""The search for sites: attention nodes, the residual stream behind each, and reasons for refusals.

A site is refused when a later node needs every token in its place, and the refusal names that node.
"""

from __future__ import annotations

import networkx as nx
from torch import fx

from thresher.compiler.analysis.attention import SDPA, SOFTMAX, Attention
from thresher.compiler.analysis.axes import Axes, hint_of, infer
from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.readout import barriers, ends_in_latents, padding, prefix
from thresher.compiler.analysis.residual import ADDS, NORMS, summands
from thresher.compiler.analysis.sites import TOKEN_AXIS, Site, Sites
from thresher.compiler.program import Program, Refusal, module_path


def find_sites(program: Program) -> Sites:
    """Search a Program for reduction sites; never raises: what is wrong is in ``refusals``."""
    axes = infer(program.graph)
    found = Sites(axes)
    attentions = [Attention(n) for n in program.graph.nodes if n.target is SDPA]
    if not attentions:
        found.refusals.append(Refusal("(graph)", _no_attention(program.graph)))
        return found
    flow = dataflow(program.graph)
    selves = [a for a in attentions if _is_self(axes, a)]
    _choose_token(found, selves)
    for attention in selves:
        _place(found, flow, attention)
    if not found.sites:
        if not found.refusals:
            found.refusals.append(
                Refusal(attentions[0].node.name, _no_self_attention(attentions[0]))
            )
        return found
    first = found.sites[0]
    found.root = _stream_root(flow, first)
    prefix(found, flow)
    if 2 * found.protected > hint_of(found.tokens) or ends_in_latents(program, found):
        found.refusals.append(Refusal(found.root.name, _long_prefix(found)))
        found.sites.clear()
        found.root = None
        return found
    barriers(found, flow)
    found.padding = padding(program, first.attention)
    return found


def _long_prefix(found: Sites) -> str:
    return (
        f"{found.protected} of {hint_of(found.tokens)} tokens stand before those that could go, as where latents"
        " are appended to patches: put the tokens that have to stay in front"
    )


def _no_attention(graph: fx.Graph) -> str:
    for node in graph.nodes:
        if node.target in SOFTMAX:
            return (
                f"no fused self-attention was found; the softmax at {node.name}"
                f" ({module_path(node) or 'top level'}) looks like attention whose logits are changed"
                " in between (talking heads, windows), which leaves no q, k, v to reduce by"
            )
    return "no attention was found: this is not a transformer that thresher can reduce"


def _no_self_attention(attention: Attention) -> str:
    return (
        f"{_where(attention.node)}sees other tokens than its own block's, such as the cache of a"
        " decoder: a token that goes would be missing for all later ones, so none are reduced"
    )


def _is_self(axes: Axes, attention: Attention) -> bool:
    return axes.of(attention.q)[-2] == axes.of(attention.k)[-2]


def _choose_token(found: Sites, attentions: list[Attention]) -> None:
    """The token axis is the one that most attention nodes run over and that a residual stream has."""
    counts: dict[int, int] = {}
    for attention in attentions:
        variable = found.axes.of(attention.q)[-2]
        counts[variable] = counts.get(variable, 0) + 1
    if counts:
        found.token = max(counts, key=lambda v: counts[v])


def _place(found: Sites, flow: nx.DiGraph[fx.Node], attention: Attention) -> None:
    node = attention.node
    if found.axes.of(attention.q)[-2] != found.token:
        found.refusals.append(
            Refusal(
                node.name,
                _where(node)
                + "attends over another axis than the other blocks (window or grouped attention)",
            )
        )
        return
    if any(u.node is node and u.kind == "mix" for u in found.axes.uses):
        found.refusals.append(
            Refusal(
                node.name,
                _where(node) + "is causal: later tokens depend on the order of earlier ones",
            )
        )
        return
    stream = _residual(found, flow, node)
    if stream is None:
        found.refusals.append(
            Refusal(
                node.name,
                _where(node)
                + "has no residual add over its token axis behind it (window attention or tokens on a grid)",
            )
        )
        return
    found.tokens = stream.meta["val"].shape[TOKEN_AXIS]
    found.sites.append(Site(len(found.sites), attention, stream, module_path(node)))
    found.blocks = len(found.sites)


def _where(node: fx.Node) -> str:
    path = module_path(node)
    return f"attention in {path} " if path else "attention "


def _residual(found: Sites, flow: nx.DiGraph[fx.Node], attention: fx.Node) -> fx.Node | None:
    """The first add behind the attention whose other operand the attention was computed from."""
    before = nx.ancestors(flow, attention)
    for node in _forward(flow, attention):
        if any(operand in before for operand in summands(node)):
            value = node.meta["val"]
            if value.dim() != 3 or found.axes.of(node)[TOKEN_AXIS] != found.token:
                return None
            users = list(node.users)
            if len(users) == 1 and users[0].target in NORMS:
                return users[0]  # post-norm: the normed tensor is the residual stream
            return node
    return None


def _forward(flow: nx.DiGraph[fx.Node], start: fx.Node) -> list[fx.Node]:
    """Descendants in program order."""
    behind = nx.descendants(flow, start)
    return [n for n in flow if n in behind]


def _stream_root(flow: nx.DiGraph[fx.Node], site: Site) -> fx.Node:
    add = site.stream if site.stream.target in ADDS else site.stream.args[0]
    assert isinstance(add, fx.Node)
    before = nx.ancestors(flow, site.attention.node)
    return next(operand for operand in summands(add) if operand in before)
