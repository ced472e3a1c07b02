"""Where tokens may be reduced: attention sites, the residual stream, and reasons for refusals.

A *site* is the residual add after a self-attention (after the LayerNorm behind it in post-norm
models): from there on fewer tokens may flow.  A site is refused when a later node needs every
token in its place, and the refusal names that node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.axes import Axes, Use, hint_of, infer, size_of
from thresher.compiler.analysis.residual import ADDS, NORMS, summands
from thresher.compiler.program import Program, Refusal, module_path

TOKEN_AXIS = 1  # of the residual stream [batch, token, channel]
SDPA = torch.ops.aten.scaled_dot_product_attention.default
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
_SUMS = (
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.sum.dim_IntList,
)


_PRODUCTS = (
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
)


@dataclass(frozen=True)
class Attention:
    """Operands of one attention node: q, k, v ``[B, H, N, d]``, optional mask, scale."""

    node: fx.Node

    @property
    def q(self) -> fx.Node:
        return self._operand(0)

    @property
    def k(self) -> fx.Node:
        return self._operand(1)

    @property
    def v(self) -> fx.Node:
        return self._operand(2)

    @property
    def mask(self) -> fx.Node | None:
        value = self.node.args[3] if len(self.node.args) > 3 else self.node.kwargs.get("attn_mask")
        return value if isinstance(value, fx.Node) else None

    @property
    def scale(self) -> float:
        value = self.node.args[6] if len(self.node.args) > 6 else self.node.kwargs.get("scale")
        return (
            float(value)
            if isinstance(value, (int, float))
            else float(self.q.meta["val"].shape[-1]) ** -0.5
        )

    @property
    def source(self) -> fx.Node | None:
        """What the keys' linear reads, ``[B, N, C]``; None if another product makes the keys."""
        return self._projected(self.k)

    @property
    def input(self) -> fx.Node | None:
        """What the linears of queries, keys and values all read, ``[B, N, C]``; None if there is no such tensor."""
        first, *others = [self._projected(operand) for operand in (self.q, self.k, self.v)]
        return first if all(other is first for other in others) else None

    @staticmethod
    def _projected(operand: fx.Node) -> fx.Node | None:
        """What the linear of an operand reads, ``[B, N, C]``."""
        frontier, seen = [operand], {operand}
        while frontier:
            node = frontier.pop(0)
            if node.target is torch.ops.aten.linear.default:
                found = node.args[0]
                return (
                    found if isinstance(found, fx.Node) and found.meta["val"].dim() == 3 else None
                )
            fresh = [n for n in node.all_input_nodes if n not in seen and n.target not in _PRODUCTS]
            frontier += fresh
            seen.update(fresh)
        return None

    def _operand(self, position: int) -> fx.Node:
        operand = self.node.args[position]
        assert isinstance(operand, fx.Node)
        return operand


@dataclass(frozen=True)
class Site:
    """A place where the token count may drop: after ``stream`` of block ``layer``."""

    layer: int
    attention: Attention
    stream: fx.Node
    path: str


@dataclass
class Sites:
    """Result of the search: usable sites, refusals, and facts about the token sequence.

    Attributes:
        token: dimension variable of the token axis, or None when no self-attention was found.
        protected: number of prefix tokens (class, distillation, registers) that never go.
        class_token: index of the prefix token that the model reads out, or that a parameter's name
            calls a class token; None where there is neither.
        root: the residual stream before the first block; what does not depend on it is side
            information (position tables, masks) and follows the tokens.
        blocks: how many blocks :attr:`Site.layer` counts, those whose site was refused later included.
        late: nodes behind the last attention that need every token: tokens are restored for them.
        shares: softmaxes over the tokens behind the last attention that only weigh sums over the tokens
            (sequence pooling): they need no token in its place.
    """

    axes: Axes
    token: int | None = None
    tokens: int | torch.SymInt = 0
    protected: int = 0
    class_token: int | None = None
    root: fx.Node | None = None
    blocks: int = 0
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    late: set[fx.Node] = field(default_factory=set)
    shares: set[fx.Node] = field(default_factory=set)
    padding: fx.Node | None = None

    @cached_property
    def offsets(self) -> dict[int, int]:
        """Token-like variables to their length less the token count (0: the axis itself)."""
        return {} if self.token is None else self.axes.variables.offsets(self.token)

    def token_axes(self, node: fx.Node) -> dict[int, int]:
        """Axes of a tensor that run over tokens: axis to offset."""
        if not self.axes.has(node):
            return {}
        return {i: self.offsets[v] for i, v in enumerate(self.axes.of(node)) if v in self.offsets}

    def carries_tokens(self, node: fx.Node) -> bool:
        """Whether any tensor that a node yields runs over tokens."""
        find = self.axes.variables.find
        return any(find(v) in self.offsets for tensor in self.axes.tensors(node) for v in tensor)

    def pools(self, node: fx.Node) -> bool:
        """Whether a node is a mean over the tokens."""
        if node.target is not torch.ops.aten.mean.dim:
            return False
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        dims = {d % operand.meta["val"].dim() for d in node.args[1]}  # type: ignore[union-attr]
        return bool(dims & set(self.token_axes(operand)))

    def pooling(self, node: fx.Node) -> tuple[int, int, bool]:
        """Of a node that pools: its token axis, prefix tokens cut off before, whether the axis stays."""
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        ((axis, offset),) = self.token_axes(operand).items()
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        return axis, -offset, keep


def dataflow(graph: fx.Graph) -> nx.DiGraph[fx.Node]:
    """The graph's data flow, nodes in program order."""
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((operand, node) for operand in node.all_input_nodes)
    return flow


def origin(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The calls that a node's value comes from, in program order; none if it is an input."""
    needed = nx.ancestors(dataflow(graph), node) | {node}
    return [n for n in graph.nodes if n in needed and n.op == "call_function"]


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
    _prefix(found, flow)
    if 2 * found.protected > hint_of(found.tokens):
        found.refusals.append(Refusal(found.root.name, _long_prefix(found)))
        found.sites.clear()
        found.root = None
        return found
    _barriers(found, flow)
    found.padding = _padding(program, flow, first.attention)
    return found


def _long_prefix(found: Sites) -> str:
    return (
        f"{found.protected} of {hint_of(found.tokens)} tokens stand before those that could go, as where latents"
        " are appended to patches: put the tokens that have to stay in front"
    )


def _no_attention(graph: fx.Graph) -> str:
    for node in graph.nodes:
        if node.target in (torch.ops.aten._softmax.default, torch.ops.aten.softmax.int):
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


def _prefix(found: Sites, flow: nx.DiGraph[fx.Node]) -> None:
    """Protected prefix and class token, from how the model builds and reads its tokens."""
    assert found.root is not None
    offsets = found.offsets
    behind = nx.descendants(flow, found.root) | {found.root}
    last = found.sites[-1].attention.node
    final = nx.descendants(flow, last)
    protected, reads = 0, []
    for use in found.axes.uses:
        offset = offsets.get(_variable(found.axes, use))
        if offset is None:
            continue
        if use.kind in ("head", "tail") and use.operand in behind:
            protected = max(protected, use.index + offset * -1 if offset < 0 else use.index)
        elif use.kind == "read" and use.node in final:
            reads.append(use.index)
            protected = max(protected, use.index + 1)
        elif use.kind == "part" and use.node not in behind | {found.root}:
            size = size_of(use.operand.meta["val"].shape[use.axis])
            protected = max(protected, size if isinstance(size, int) else 0)
    built = [-offset for offset in offsets.values() if offset < 0]
    found.protected = max([protected, *built])
    found.class_token = min(reads) if reads else _named_class_token(found, flow)


def _named_class_token(found: Sites, flow: nx.DiGraph[fx.Node]) -> int | None:
    """Index 0 when the first prefix token is a parameter that its model calls a class token."""
    offsets = found.offsets
    for use in found.axes.uses:
        if (
            use.kind == "part"
            and use.axis == TOKEN_AXIS
            and found.axes.of(use.node)[TOKEN_AXIS] in offsets
        ):
            sources = nx.ancestors(flow, use.operand) | {use.operand}
            if any("cls" in n.name or "class" in n.name for n in sources if n.op == "placeholder"):
                return 0
    return None


def _variable(axes: Axes, use: Use) -> int:
    variables = axes.of(use.operand)
    return variables[use.axis] if use.axis < len(variables) else -1


def _barriers(found: Sites, flow: nx.DiGraph[fx.Node]) -> None:
    """Nodes that need every token: refuse the sites they stand behind, or restore tokens late."""
    assert found.root is not None
    offsets = found.offsets
    behind = nx.descendants(flow, found.root) | {found.root}
    later = {s.attention.node for s in found.sites}
    found.shares, sums = _sequence_pooling(found, flow, behind, later)
    refused: dict[fx.Node, str] = {}
    for use in found.axes.uses:
        if use.operand not in behind or _variable(found.axes, use) not in offsets:
            continue
        if use.node in found.shares | sums:
            continue
        if use.kind == "output" or (use.kind == "mix" and not _is_attention(use.node)):
            if use.kind == "mix" and (nx.descendants(flow, use.node) & later):
                refused[use.node] = use.why
            else:
                found.late.add(use.node)
    for node, why in refused.items():
        upstream = nx.ancestors(flow, node)
        for site in [s for s in found.sites if s.stream in upstream]:
            found.sites.remove(site)
            found.refusals.append(
                Refusal(
                    site.stream.name,
                    f"{node.name} ({module_path(node) or node.target}) stands between this block and later"
                    f" attention and needs every token in place: it {why}",
                )
            )


def _sequence_pooling(
    found: Sites, flow: nx.DiGraph[fx.Node], behind: set[fx.Node], later: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Softmaxes over the tokens that only weigh sums over them, and those sums.

    Compact transformers (Hassani et al., 2021) read their tokens out so: ``softmax(x w)^T x``.
    """
    needs: dict[fx.Node, set[str]] = {}
    for use in found.axes.uses:
        if _variable(found.axes, use) in found.offsets:
            needs.setdefault(use.node, set()).add(use.kind)
    shares: set[fx.Node] = set()
    sums: set[fx.Node] = set()
    for node in behind:
        if node.target not in _SOFTMAX or "mix" not in needs.get(node, ()):
            continue
        if len(found.token_axes(node)) > 1 or nx.descendants(flow, node) & later:
            continue
        reached, frontier = set(), list(node.users)
        while frontier:
            user = frontier.pop()
            if user not in needs and user.op != "output":
                frontier += user.users
            else:
                reached.add(user)
        if all(user.target in _SUMS for user in reached):
            shares.add(node)
            sums |= reached
    return shares, sums


def _is_attention(node: fx.Node) -> bool:
    return node.target is SDPA


def _padding(program: Program, flow: nx.DiGraph[fx.Node], first: Attention) -> fx.Node | None:
    """The first attention's mask if it depends on a user input: it says which tokens are padding."""
    mask = first.mask
    inputs = set(program.input_nodes())
    if mask is None or not (nx.ancestors(flow, mask) | {mask}) & inputs:
        return None
    if mask.meta["val"].dim() != 4 or not _depends_on_values(mask, inputs):
        return None  # without a batch it says nothing of any one item
    return mask


def _depends_on_values(mask: fx.Node, inputs: set[fx.Node]) -> bool:
    """Whether a mask is computed from an input's values and not only from its sizes."""
    frontier, seen = [mask], set()
    while frontier:
        node = frontier.pop()
        if node in inputs:
            return True
        for operand in node.all_input_nodes:
            if operand not in seen and isinstance(operand.meta.get("val"), torch.Tensor):
                seen.add(operand)
                frontier.append(operand)
    return False
