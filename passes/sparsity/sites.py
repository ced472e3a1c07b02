"""Where activation sparsity can be used: feed-forward networks and the linears of attention.

All by data flow.  A feed-forward network is a linear whose input is computed neuron by neuron from
one linear (plain), or from two or from the two halves of one (gated), and whose result returns to
a residual stream.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from thresher.compiler.analysis.sites import SDPA
from thresher.compiler.program import Program, Refusal, module_path

aten = torch.ops.aten
LINEAR = aten.linear.default
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_ALSO_POINTWISE = (aten._to_copy.default, aten.clone.default, aten.alias.default)
_MOVES = (aten.permute.default, aten.transpose.int)
_SCALES = (aten.mul.Tensor, aten.div.Tensor, *_ALSO_POINTWISE)  # keep a straight line straight

Weights: TypeAlias = dict[fx.Node, str]


@dataclass(frozen=True)
class Source:
    """Where one factor of the hidden tensor comes from: rows ``start`` and on of a linear."""

    linear: fx.Node
    start: int = 0


@dataclass(frozen=True)
class FFN:
    """One feed-forward network.

    Attributes:
        hidden: ``[..., H]``, what ``down`` reads: one value per neuron.
        sources: one for a plain network, two for a gated one.
        gate: in a gated network the node behind the non-linearity, ``[..., H]``.
        inner: nodes between the sources and ``hidden``, both included, that run over neurons.
    """

    layer: int
    path: str
    hidden: fx.Node
    down: fx.Node
    sources: tuple[Source, ...]
    gate: fx.Node | None
    inner: frozenset[fx.Node]

    @property
    def gated(self) -> bool:
        return len(self.sources) == 2

    @property
    def width(self) -> int:
        """Neurons."""
        return int(self.hidden.meta["val"].shape[-1])

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """Each linear that makes the hidden tensor, once."""
        return tuple(dict.fromkeys(source.linear for source in self.sources))


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
class Found:
    """What a search found.

    What looked like a feed-forward network and is none is refused, and so are inputs of one name.
    """

    ffns: list[FFN] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def operand(node: fx.Node, position: int) -> fx.Node:
    """An operand that is a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found


def find(program: Program) -> Found:
    """Search a Program; never raises."""
    found, stored = Found(), stored_weights(program)
    for node in program.graph.nodes:
        if node.target is LINEAR:
            made = _ffn(node, len(found.ffns), stored)
            if isinstance(made, FFN):
                found.ffns.append(made)
            elif made is not None:
                found.refusals.append(made)
    found.inputs, alike = _told_apart(_inputs(program.graph, found.ffns, stored))
    if not found.ffns and not found.refusals:
        reason = "no feed-forward network was found: no linear reads what comes out of another linear's activation"
        found.refusals.append(Refusal("(graph)", reason))
    found.refusals += alike
    return found


def stored_weights(program: Program) -> Weights:
    """Placeholders of weights to the names under which they are stored."""
    signature = program.exported.graph_signature
    targets = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target}
    return {
        n: targets[n.name]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in targets
    }


# --- feed-forward networks ------------------------------------------------------------------------


@dataclass
class _Cone:
    """Everything that the hidden tensor is computed from, back to the linears."""

    sources: list[Source] = field(default_factory=list)
    inner: set[fx.Node] = field(default_factory=set)
    blocked: fx.Node | None = None
    bends: list[fx.Node] = field(default_factory=list)


def _ffn(down: fx.Node, layer: int, stored: Weights) -> FFN | Refusal | None:
    """The network that ends in a linear, why it cannot be used, or None if it is nothing like one."""
    hidden = operand(down, 0)
    normed = hidden.target in _NORMS
    cone = _cone(operand(hidden, 0) if normed else hidden)
    if cone.blocked is not None or not cone.sources or not _bends(cone):
        return None
    if normed:
        return _refuse(hidden, "normalises over the neurons, so that none can go alone")
    if len(cone.sources) > 2:
        return _refuse(down, f"reads a product of {len(cone.sources)} linears")
    if not _returns(down):
        return _refuse(down, "does not return to a residual stream (a pooler or a head)")
    for linear in dict.fromkeys(source.linear for source in cone.sources):
        pieces = [s.start for s in cone.sources if s.linear is linear]
        width = int(hidden.meta["val"].shape[-1])
        if sorted(pieces) != [i * width for i in range(linear.meta["val"].shape[-1] // width)]:
            return _refuse(linear, "is cut into pieces that are not all read by the network")
    for linear in dict.fromkeys((down, *(source.linear for source in cone.sources))):
        weight = operand(linear, 1)
        if weight not in stored:
            return _refuse(linear, f"has a weight that is computed ({weight.name})")
        other = next((user for user in weight.users if user is not linear), None)
        if other is not None:
            return _refuse(linear, f"shares its weight with {other.name}")
    for node in cone.inner:
        other = next(
            (u for u in node.users if not (u in cone.inner or u is down or _asks(u))), None
        )
        if other is not None:
            return _refuse(node, f"is also read by {other.name}, outside of the network")
    order = {node: index for index, node in enumerate(down.graph.nodes)}
    sources = sorted(cone.sources, key=lambda s: (order[s.linear], s.start))
    gate = max(cone.bends, key=order.__getitem__) if len(sources) == 2 and cone.bends else None
    path = module_path(down) or down.name
    return FFN(layer, path, hidden, down, tuple(sources), gate, frozenset(cone.inner))


def _refuse(node: fx.Node, why: str) -> Refusal:
    return Refusal(node.name, f"{module_path(node) or node.name} {why}")


def _cone(hidden: fx.Node) -> _Cone:
    """Walk back from ``hidden`` through what works neuron by neuron."""
    cone, stack = _Cone(), [hidden]
    while stack and cone.blocked is None:
        node = stack.pop()
        if node in cone.inner:
            continue
        source = source_of(node)
        if source is not None:
            cone.sources.append(source)
            cone.inner |= _down_to(node, source.linear)
        elif not is_pointwise(node):
            cone.blocked = node
        else:
            cone.inner.add(node)
            if not (node.target in _SCALES or node.target in _ADDS):
                cone.bends.append(node)
            stack += [n for n in node.all_input_nodes if not _is_scalar(n)]
    return cone


def source_of(node: fx.Node) -> Source | None:
    """A linear, or the piece of one, that a node is."""
    if node.target is LINEAR:
        return Source(node)
    if node.target is operator.getitem and operand(node, 0).target in SPLITS:
        split = operand(node, 0)
        linear, pieces = operand(split, 0), split.meta["val"]
        if linear.target is LINEAR and _is_last(split, 2) and isinstance(node.args[1], int):
            return Source(linear, sum(int(p.shape[-1]) for p in pieces[: node.args[1]]))
    if node.target is not aten.slice.Tensor or operand(node, 0).target is not LINEAR:
        return None
    stepless = len(node.args) < 5 or node.args[4] == 1
    if stepless and _is_last(node, 1):
        return Source(operand(node, 0), int(node.args[2] or 0))  # type: ignore[arg-type]
    return None


def _is_last(node: fx.Node, position: int) -> bool:
    axis: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return bool(axis in (-1, operand(node, 0).meta["val"].dim() - 1))


def _down_to(node: fx.Node, linear: fx.Node) -> set[fx.Node]:
    """A piece of a linear's result, the split that makes it, and the linear."""
    found = {node}
    while node is not linear:
        node = operand(node, 0)
        found.add(node)
    return found


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node works on each element by itself."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in _ALSO_POINTWISE


def _is_scalar(node: fx.Node) -> bool:
    """Whether an operand is the same for every neuron."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[-1] == 1


def _bends(cone: _Cone) -> bool:
    return bool(cone.bends) or len(cone.sources) == 2


def _asks(user: fx.Node) -> bool:
    """Whether a user only asks for a size other than that of the neurons."""
    if user.target is not aten.sym_size.int:
        return False
    axis: Any = user.args[1]
    return bool(axis % operand(user, 0).meta["val"].dim() != operand(user, 0).meta["val"].dim() - 1)


def _returns(down: fx.Node) -> bool:
    """Whether a result is added to another tensor of its shape, scaled or normalised before at most."""
    node = down
    while True:
        users = [user for user in node.users if not _asks(user)]
        if len(users) != 1:
            return False
        (user,) = users
        if user.target in _ADDS:
            others = [n for n in user.all_input_nodes if n is not node]
            if others and others[0].op != "placeholder":
                return True
        elif not (is_pointwise(user) or user.target in (*_NORMS, *_MOVES)):
            return False
        node = user


# --- inputs of linears ----------------------------------------------------------------------------


def _inputs(graph: fx.Graph, ffns: list[FFN], stored: Weights) -> Iterator[Input]:
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
        _refuse(entry.linears[0], f"is one of {len(group)} places that would be called {name}")
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
