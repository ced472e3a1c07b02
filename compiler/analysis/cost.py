"""What a node costs: multiply-accumulates and bytes, and how both shrink with the tokens.

"FLOPs" in the token-reduction literature are multiply-accumulates; so are ours.  Per block with N
tokens of width C this counts ``4 N C^2 + 2 N^2 C`` for attention and ``8 N C^2`` for the MLP, the
convention of ToMe, EViT and DiffRate.  Softmax, norms and activations are left out there and here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from thresher.compiler.analysis.macs import rule_of
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.program import Program, provenance, stored_tensors

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
    shapes = [_operand(a, batch, sizes) for a in node.args]
    rule = rule_of(node.target, provenance(node).get(SHARE, 1.0))
    macs = rule(shapes, shape_of(results[0], batch, sizes)) if rule else 0
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
