"""Which axes of which tensors are the token axis: inference of dimension variables.

Every axis of every tensor gets a variable; each operator states which of its axes are equal
(elementwise operands, matmul rows, permuted axes ...).  Equal variables are unified until nothing
changes.  Three derived forms are kept by congruence: ``suffix(v, k)`` is ``v`` without its first k
entries, ``cat`` is its inverse, ``product`` is a merge of neighbouring axes.

Operators also record *uses* of an axis (it is read at one index, averaged, mixed ...), which
decide later where the number of tokens may change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

MAX_ROUNDS = 12

Size = Any  # int or sympy expression


def size_of(value: int | torch.SymInt) -> Size:
    """Comparable size: an int, or the expression behind a symbolic one."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_Integer else expression


def hint_of(value: int | torch.SymInt) -> int:
    """The size in the traced example."""
    return value if isinstance(value, int) else int(cast(int, value.node.hint))


@dataclass(frozen=True)
class Use:
    """How a node treats one axis of an operand.

    ``kind``: ``mix`` (needs every entry, in order), ``read`` (entry ``index``), ``head`` (the first
    ``index`` entries), ``tail`` (all but the first ``index``), ``mean``, ``query``, ``key``, ``output``.
    """

    node: fx.Node
    operand: fx.Node
    axis: int
    kind: str
    index: int = 0
    why: str = ""


class Variables:
    """Union-find over dimension variables with their sizes and derived forms."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[Size] = []
        self._suffix: dict[tuple[int, int], int] = {}
        self._product: dict[tuple[int, ...], int] = {}
        self._grids: set[tuple[int, ...]] = set()
        self.unions = 0

    def new(self, size: Size) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def find(self, v: int) -> int:
        while self._parent[v] != v:
            self._parent[v] = self._parent[self._parent[v]]
            v = self._parent[v]
        return v

    def size(self, v: int) -> Size:
        return self._size[self.find(v)]

    def union(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b and self._size[a] == self._size[b]:
            self._parent[max(a, b)] = min(a, b)
            self.unions += 1

    def suffix(self, v: int, drop: int) -> int:
        """The variable of ``v`` without its first ``drop`` entries."""
        key = (self.find(v), drop)
        if key not in self._suffix:
            self._suffix[key] = self.new(self.size(v) - drop)
        return self._suffix[key]

    def cat(self, prefix: int, v: int, size: Size) -> int:
        """The variable whose suffix after ``prefix`` entries is ``v``."""
        root = self.find(v)
        for (whole, drop), rest in self._suffix.items():
            if drop == prefix and self.find(rest) == root:
                return whole
        whole = self.new(size)
        self._suffix[(whole, prefix)] = v
        return whole

    def product(self, parts: Sequence[int], size: Size) -> int:
        key = tuple(self.find(p) for p in parts)
        if key not in self._product:
            self._product[key] = self.new(size)
        return self._product[key]

    def factors(self, v: int) -> tuple[int, ...] | None:
        """The axes that were merged into ``v``, or None."""
        root = self.find(v)
        merged = (key for key, whole in self._product.items() if self.find(whole) == root)
        return next((key for key in merged if key not in self._grids), None)

    def parts(self, v: int, sizes: Sequence[Size]) -> tuple[tuple[int, ...], bool]:
        """Axes of these sizes that make up ``v``, and whether it is known to be merged from them."""
        root, wanted = self.find(v), list(sizes)
        if len(wanted) == 1:
            return (root,), True
        known = [
            key
            for key, whole in self._product.items()
            if self.find(whole) == root and [self.size(part) for part in key] == wanted
        ]
        merged = next((key for key in known if key not in self._grids), None)
        if merged is not None or known:
            return merged or known[0], merged is not None
        key = tuple(map(self.new, wanted))
        self._product[key] = v
        self._grids.add(key)
        return key, False

    def close(self) -> None:
        """Restore congruence after unions: equal keys have equal values, and the inverse holds."""
        suffix: dict[tuple[int, int], int] = {}
        inverse: dict[tuple[int, int], int] = {}
        for (whole, drop), rest in self._suffix.items():
            key = (self.find(whole), drop)
            if key in suffix:
                self.union(suffix[key], rest)
            back = (self.find(rest), drop)
            if back in inverse:
                self.union(inverse[back], whole)
            suffix.setdefault(key, rest)
            inverse.setdefault(back, whole)
        self._suffix = {(self.find(w), d): r for (w, d), r in suffix.items()}
        product: dict[tuple[int, ...], int] = {}
        for parts, whole in self._product.items():
            roots = tuple(self.find(p) for p in parts)
            if roots in product:
                self.union(product[roots], whole)
            product.setdefault(roots, whole)
        self._product = product
        self._grids = {tuple(self.find(p) for p in parts) for parts in self._grids}

    def offsets(self, v: int) -> dict[int, int]:
        """Every variable tied to ``v`` by a constant difference of length: root to ``len - len(v)``."""
        known = {self.find(v): 0}
        frontier = [self.find(v)]
        while frontier:
            at = frontier.pop()
            for (whole, drop), rest in self._suffix.items():
                pair = {self.find(whole): 0, self.find(rest): -drop}
                if at in pair:
                    for other, length in pair.items():
                        if other not in known:
                            known[other] = known[at] + length - pair[at]
                            frontier.append(other)
        return known


@dataclass
class Axes:
    """Result of the inference: the variables of every tensor, and the uses of their axes."""

    variables: Variables = field(default_factory=Variables)
    uses: list[Use] = field(default_factory=list)
    _of: dict[fx.Node, list[tuple[int, ...]]] = field(default_factory=dict)

    def of(self, node: fx.Node, index: int = 0) -> tuple[int, ...]:
        """Canonical variables of a tensor's axes (``index`` picks from a tuple of tensors)."""
        return tuple(self.variables.find(v) for v in self._of[node][index])

    def has(self, node: object) -> bool:
        return isinstance(node, fx.Node) and bool(self._of.get(node))

    def tensors(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Raw variables of every tensor that a node yields."""
        return self._of[node]

    def declare(self, node: fx.Node) -> None:
        """Give every axis of a node's tensors a fresh variable."""
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else [value]
        self._of[node] = [
            tuple(self.variables.new(size_of(s)) for s in item.shape)
            for item in values
            if isinstance(item, torch.Tensor)
        ]


def infer(graph: fx.Graph) -> Axes:
    """Label the axes of every tensor in a traced graph."""
    from thresher.compiler.analysis.rules import apply_rule

    axes = Axes()
    for node in graph.nodes:
        axes.declare(node)
    for _ in range(MAX_ROUNDS):
        before = axes.variables.unions
        axes.uses.clear()
        for node in graph.nodes:
            apply_rule(axes, node)
        axes.variables.close()
        if axes.variables.unions == before:
            break
    return axes


def tensor_operands(node: fx.Node) -> Iterable[fx.Node]:
    """Operands that are tensors (not sizes)."""
    return (n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
