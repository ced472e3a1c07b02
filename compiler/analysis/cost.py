"""What a node costs: multiply-accumulates and bytes, and how both shrink with the tokens.

"FLOPs" in the token-reduction literature are multiply-accumulates; so are ours.  Per block with N
tokens of width C this counts ``4 N C^2 + 2 N^2 C`` for attention and ``8 N C^2`` for the MLP, the
convention of ToMe, EViT and DiffRate.  Softmax, norms and activations are left out there and here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.export.graph_signature import InputKind

from thresher.compiler.analysis.attention import SDPA
from thresher.compiler.analysis.axes import hint_of, size_of
from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.program import Program, provenance, stored_tensors

aten = torch.ops.aten
Shape = Sequence[int]
SHARE = "share"  # a pass notes on a node which part of the work that depends on data is expected


def symbol_sizes(program: Program, named: Mapping[str, int]) -> dict[str, int]:
    """Sizes of symbolic axes by the graph's symbols, of those by the user's names."""
    return {symbol: named[name] for symbol, name in program.symbols.items() if name in named}


def parameters(program: Program) -> int:
    """Number of weights, those that passes stored included and buffers not; tied ones count once."""
    specs = program.exported.graph_signature.input_specs
    buffers = {spec.target for spec in specs if spec.kind is InputKind.BUFFER}
    stored = stored_tensors(program.exported).items()
    floats = {t.data_ptr(): t for k, t in stored if t.is_floating_point() and k not in buffers}
    return sum(tensor.numel() for tensor in floats.values())


def shape_of(
    value: object, batch: int | None = None, sizes: Mapping[str, int] | None = None
) -> list[int]:
    """Concrete shape: symbols at ``sizes`` or else at their traced example, a symbolic leading axis at
    ``batch``.
    """
    if not isinstance(value, torch.Tensor):
        return []
    shape = [_size_at(s, sizes or {}) for s in value.shape]
    if batch is not None and shape and not isinstance(size_of(value.shape[0]), int):
        shape[0] = _rows(size_of(value.shape[0]), batch)
    return shape


def _rows(expression: Any, batch: int) -> int:
    """A symbolic leading axis for so many items: the batch, or windows or heads of it, ``9 * batch``."""
    symbols = expression.free_symbols
    return int(expression.subs(dict.fromkeys(symbols, batch))) if len(symbols) == 1 else batch


def _size_at(value: int | torch.SymInt, sizes: Mapping[str, int]) -> int:
    if isinstance(value, int) or not sizes:
        return hint_of(value)
    expression = value.node.expr
    known = {s: sizes[str(s)] for s in expression.free_symbols if str(s) in sizes}
    whole = len(known) == len(expression.free_symbols)
    return int(expression.subs(known)) if whole else hint_of(value)


def _linear(args: list[Shape], out: Shape) -> int:
    return prod(out) * args[1][-1]


def _matmul(args: list[Shape], out: Shape) -> int:
    return prod(out) * args[0][-1]


def _convolution(args: list[Shape], out: Shape) -> int:
    return prod(out) * prod(args[1][1:])


def _attention(args: list[Shape], out: Shape) -> int:
    queries, keys = args[0], args[1]
    return prod(out[:-1]) * keys[-2] * (queries[-1] + out[-1])


def _bipartite_merge(args: list[Shape], out: Shape) -> int:
    """Similarity of every source to every destination, plus the merge of r rows."""
    (batch, tokens, width), dim = args[0], args[2][-1]
    removed = tokens - out[1]
    return batch * ((tokens // 2) ** 2 * dim + removed * removed * width)


def _gate(args: list[Shape], out: Shape) -> int:
    return prod(out) * prod(args[1])


def _adaptive(args: list[Shape], out: Shape, share: float) -> int:
    """The share is that of the learners that run, whose matrices are the operands of rank 3."""
    learners = sum(prod(shape) for shape in args[2:] if len(shape) == 3)
    return round(share * prod(args[0][:-1]) * learners)


def _class_attention(args: list[Shape], out: Shape) -> int:
    return prod(args[1])


def _prune_merge(args: list[Shape], out: Shape) -> int:
    """Similarity of every joining token to every one that stays, plus the merge of their rows."""
    (batch, _, width), (pruned,) = args[0], args[3]
    joining = pruned - out[1]
    return batch * joining * (out[1] + joining) * width


def _keep_tokens(args: list[Shape], out: Shape) -> int:
    return prod(args[0]) - prod(out)


def _sparse_linear(args: list[Shape], out: Shape, share: float) -> int:
    """The share is that of the inputs which few tokens need; many need all."""
    tokens, (most,) = prod(out[:-1]), args[3]
    return round((share if tokens <= most else 1) * tokens * prod(args[1]))


def _sparse_gated_ffn(args: list[Shape], out: Shape, share: float) -> int:
    """The gate is dense; the share is that of the neurons which few tokens need."""
    tokens, (most,) = prod(out[:-1]), args[6]
    gate, up, down = map(prod, args[1:4])
    return tokens * gate + round((share if tokens <= most else 1) * tokens * (up + down))


def _select_diverse(args: list[Shape], out: Shape) -> int:
    """Similarity of all pairs; the prefix, which is left out, is counted."""
    batch, tokens, width = args[0]
    return batch * tokens * tokens * width


def _soft_merge(args: list[Shape], out: Shape) -> int:
    """Every mean over all tokens; the prefix, which is left out, is counted."""
    return prod(args[2]) * args[1][-1]


def _token_energy(args: list[Shape], out: Shape) -> int:
    """Cosine of every token to every one behind the prefix."""
    (*_, tokens, dim), (protected,) = args[0], args[3]
    return prod(out) * (tokens - protected) * dim


def _redundant_merge(args: list[Shape], out: Shape) -> int:
    """Similarity of every source to every target, plus the merge of their rows."""
    (batch, tokens, width), dim = args[0], args[2][-1]
    removed = tokens - out[1]
    return batch * removed * removed * (dim + width)


_MACS: dict[object, Callable[[list[Shape], Shape], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.convolution.default: _convolution,
    SDPA: _attention,
}
_OURS = {
    "thresher::adaptive_gate": _gate,
    "thresher::bipartite_merge": _bipartite_merge,
    "thresher::class_attention": _class_attention,
    "thresher::keep_tokens": _keep_tokens,
    "thresher::prune_merge": _prune_merge,
    "thresher::redundant_merge": _redundant_merge,
    "thresher::select_diverse": _select_diverse,
    "thresher::soft_merge": _soft_merge,
    "thresher::token_energy": _token_energy,
}
_BY_DATA: dict[str, Callable[[list[Shape], Shape, float], int]] = {
    "thresher::adaptive_gated_mlp": _adaptive,
    "thresher::adaptive_mlp": _adaptive,
    "thresher::expert_mlp": _adaptive,
    "thresher::sparse_gated_ffn": _sparse_gated_ffn,
    "thresher::sparse_linear": _sparse_linear,
}


@dataclass(frozen=True)
class NodeCost:
    """MACs and bytes moved (operands read, results written) by one node."""

    macs: int
    bytes: int


def node_cost(node: fx.Node, batch: int = 1, sizes: Mapping[str, int] | None = None) -> NodeCost:
    """Cost of one call for ``batch`` items; of work that depends on the data, the share that its pass expects.

    Args:
        sizes: of symbols, see :func:`symbol_sizes`; others are those of the traced example.
    """
    values = [n.meta.get("val") for n in node.all_input_nodes]
    result = node.meta.get("val")
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else ""
    shapes: list[Shape] = [_operand(a, batch, sizes) for a in node.args]
    out = shape_of(results[0], batch, sizes)
    if name in _BY_DATA:
        macs = _BY_DATA[name](shapes, out, provenance(node).get(SHARE, 1.0))
    else:
        rule = _MACS.get(node.target) or _OURS.get(name)
        macs = rule(shapes, out) if rule else 0
    moved = sum(
        prod(shape_of(v, batch, sizes)) * v.element_size()
        for v in [*values, *results]
        if isinstance(v, torch.Tensor)
    )
    return NodeCost(macs, moved)


def _operand(value: object, batch: int, sizes: Mapping[str, int] | None) -> list[int]:
    """What a rule sees of an operand: its shape, or a whole number as a list of one."""
    given = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(given, (int, torch.SymInt)):
        return [_size_at(given, sizes or {})]
    return shape_of(given, batch, sizes)


def total_macs(graph: fx.Graph, batch: int = 1, sizes: Mapping[str, int] | None = None) -> int:
    """MACs of a whole graph for ``batch`` items, at ``sizes`` of symbols."""
    return sum(node_cost(n, batch, sizes).macs for n in graph.nodes if n.op == "call_function")


@dataclass(frozen=True)
class CostModel:
    """MACs of one item as a function of the tokens after each site.

    ``terms[segment][degree]`` are MACs at full token count of the nodes that lie behind exactly
    ``segment`` sites and grow with the count to that power; ``segment`` 0 is before the first.
    """

    tokens: int
    terms: Mapping[int, Mapping[int, int]]
    dense: int

    def share(self, counts: Sequence[Any]) -> Any:
        """MACs with ``counts[i]`` tokens behind site i over the dense ones; numbers or scalar tensors."""
        seen = [self.tokens, *counts]
        total = 0.0
        for segment, degrees in self.terms.items():
            left = seen[segment] / self.tokens
            total = total + sum(macs * left**degree for degree, macs in degrees.items())
        return total / self.dense

    def macs(self, counts: Sequence[int]) -> int:
        """MACs with ``counts[i]`` tokens behind site i."""
        return round(float(self.share(counts)) * self.dense)

    def ideal(self, counts: Sequence[int]) -> float:
        """Ideal speed-up: dense MACs over reduced MACs."""
        return self.dense / self.macs(counts)


def cost_model(graph: fx.Graph, sites: Sites) -> CostModel:
    """Analytic cost of a dense graph under token reduction at its sites, for one item.

    Exact for linear layers and attention over the token axis; a node with a prefix cut off counts
    as if it scaled with the whole sequence.
    """
    flow = dataflow(graph)
    behind = {site.layer: nx.descendants(flow, site.stream) for site in sites.sites}
    restored: set[fx.Node] = set(sites.late)
    for node in sites.late:
        restored |= nx.descendants(flow, node)
    terms: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    dense = 0
    for node in graph.nodes:
        macs = node_cost(node).macs if node.op == "call_function" else 0
        if not macs:
            continue
        dense += macs
        segment = 0 if node in restored else sum(node in nodes for nodes in behind.values())
        terms[segment][token_degree(sites, node) if segment else 0] += macs
    return CostModel(
        hint_of(sites.tokens) if sites.sites else 1, {s: dict(d) for s, d in terms.items()}, dense
    )


def token_degree(sites: Sites, node: fx.Node) -> int:
    """The power of the token count with which a node's work grows: 0, 1 or 2."""
    if node.target is SDPA:
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        return sum(
            any(axis == a.meta["val"].dim() - 2 for axis in sites.token_axes(a)) for a in operands
        )
    return min(1, len(sites.token_axes(node))) or int(
        any(sites.token_axes(a) for a in node.args[:1] if isinstance(a, fx.Node))
        and bool(sites.token_axes(node))
    )
