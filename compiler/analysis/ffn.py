"""Feed-forward networks, by data flow.

One is a linear whose input is computed neuron by neuron from one linear (plain), or from two or
from the two halves of one (gated), and whose result returns to a residual stream.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.linears import LINEAR, Names, bias_of, operand, stored_weights
from thresher.compiler.analysis.residual import ADDS, NORMS
from thresher.compiler.program import Program, Refusal, module_path
from thresher.kernels.activations import ACTIVATIONS, identity

aten = torch.ops.aten
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_ALSO_POINTWISE = (aten._to_copy.default, aten.clone.default, aten.alias.default)
_MOVES = (aten.permute.default, aten.transpose.int)
_SCALES = (aten.mul.Tensor, aten.div.Tensor, *_ALSO_POINTWISE)  # keep a straight line straight


@dataclass(frozen=True)
class Source:
    """Where one factor of the hidden tensor comes from: rows ``start`` and on of a linear.

    ``node`` is that piece, the linear itself where it is not cut.
    """

    linear: fx.Node
    node: fx.Node
    start: int = 0


@dataclass(frozen=True)
class Form:
    """What a network computes: ``hidden = act(bent)``, times ``factor`` in a gated one.

    Attributes:
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.
        bent, factor: what is activated, and in a gated network what that is multiplied with.
        active: the node that is ``act(bent)``, None if there is none, as in ``x * (sigmoid(x) * factor)``.
    """

    activation: str
    bent: Source
    factor: Source | None
    active: fx.Node | None


@dataclass(frozen=True)
class FFN:
    """One feed-forward network.

    Attributes:
        layer: its number among those found, from 0.
        path: the module that it stands in.
        hidden: ``[..., H]``, what ``down`` reads: one value per neuron.
        sources: one for a plain network, two for a gated one.
        bend: in a gated network the last node that is no straight line, ``[..., H]``.
        inner: nodes from the linears to ``hidden``, all included; nobody else reads them.
    """

    layer: int
    path: str
    hidden: fx.Node
    down: fx.Node
    sources: tuple[Source, ...]
    bend: fx.Node | None
    inner: frozenset[fx.Node]

    @property
    def gated(self) -> bool:
        return len(self.sources) == 2

    @property
    def gate(self) -> fx.Node | None:
        """In a gated network the node behind its activation, ``[..., H]``; None where no node is that."""
        return self.bend if self.form is None or not self.gated else self.form.active

    @property
    def width(self) -> int:
        """Neurons."""
        return int(self.hidden.meta["val"].shape[-1])

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """Each linear that makes the hidden tensor, once."""
        return tuple(dict.fromkeys(source.linear for source in self.sources))

    @property
    def x(self) -> fx.Node | None:
        """What all of these linears read; None where they read different tensors."""
        read = {operand(linear, 0) for linear in self.linears}
        return read.pop() if len(read) == 1 else None

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        """Placeholders of its matrices and biases, each once."""
        every = (*self.linears, self.down)
        biases = (bias for linear in every if (bias := bias_of(linear)) is not None)
        return tuple(dict.fromkeys([*(operand(linear, 1) for linear in every), *biases]))

    @property
    def activation(self) -> str | None:
        """The name of its activation, or None for what has no name."""
        return None if self.form is None else self.form.activation

    @cached_property
    def form(self) -> Form | None:
        """Activation and factors, or None for what has no name.

        Recognised by what the nodes compute, not by which they are: frameworks write one
        activation as one operator or as ten.
        """
        return _form(self)


@dataclass
class Found:
    """What a search found; what looked like a feed-forward network and is none is refused."""

    ffns: list[FFN] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


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
    if not found.ffns and not found.refusals:
        reason = "no feed-forward network was found: no linear reads what comes out of another linear's activation"
        found.refusals.append(Refusal("(graph)", reason))
    return found


def refuse(node: fx.Node, why: str) -> Refusal:
    """A refusal that begins with the path of the node's module."""
    return Refusal(node.name, f"{module_path(node) or node.name} {why}")


# --- the search -----------------------------------------------------------------------------------


@dataclass
class _Cone:
    """Everything that the hidden tensor is computed from, back to the linears."""

    sources: list[Source] = field(default_factory=list)
    inner: set[fx.Node] = field(default_factory=set)
    blocked: fx.Node | None = None
    bends: list[fx.Node] = field(default_factory=list)


def _ffn(down: fx.Node, layer: int, stored: Names) -> FFN | Refusal | None:
    """The network that ends in a linear, why it cannot be used, or None if it is nothing like one."""
    hidden = operand(down, 0)
    normed = hidden.target in NORMS
    cone = _cone(operand(hidden, 0) if normed else hidden)
    if cone.blocked is not None or not cone.sources or not _bends(cone):
        return None
    if normed:
        return refuse(hidden, "normalises over the neurons, so that none can go alone")
    if len(cone.sources) > 2:
        return refuse(down, f"reads a product of {len(cone.sources)} linears")
    if sum_behind(down) is None:
        return refuse(down, "does not return to a residual stream (a pooler or a head)")
    for linear in dict.fromkeys(source.linear for source in cone.sources):
        pieces = [s.start for s in cone.sources if s.linear is linear]
        width = int(hidden.meta["val"].shape[-1])
        if sorted(pieces) != [i * width for i in range(linear.meta["val"].shape[-1] // width)]:
            return refuse(linear, "is cut into pieces that are not all read by the network")
    for linear in dict.fromkeys((down, *(source.linear for source in cone.sources))):
        weight = operand(linear, 1)
        if weight not in stored:
            return refuse(linear, f"has a weight that is computed ({weight.name})")
        other = next((user for user in weight.users if user is not linear), None)
        if other is not None:
            return refuse(linear, f"shares its weight with {other.name}")
    for node in cone.inner:
        other = next(
            (u for u in node.users if not (u in cone.inner or u is down or _asks(u))), None
        )
        if other is not None:
            return refuse(node, f"is also read by {other.name}, outside of the network")
    order = {node: index for index, node in enumerate(down.graph.nodes)}
    sources = sorted(cone.sources, key=lambda s: (order[s.linear], s.start))
    bend = max(cone.bends, key=order.__getitem__) if len(sources) == 2 and cone.bends else None
    path = module_path(down) or down.name
    return FFN(layer, path, hidden, down, tuple(sources), bend, frozenset(cone.inner))


def _cone(hidden: fx.Node) -> _Cone:
    """Walk back from ``hidden`` through what works neuron by neuron."""
    cone, stack = _Cone(), [hidden]
    while stack and cone.blocked is None:
        node = stack.pop()
        if node in cone.inner:
            continue
        source = _source(node)
        if source is not None:
            cone.sources.append(source)
            cone.inner |= _down_to(node, source.linear)
        elif not is_pointwise(node):
            cone.blocked = node
        else:
            cone.inner.add(node)
            if not (node.target in _SCALES or node.target in ADDS):
                cone.bends.append(node)
            stack += [n for n in node.all_input_nodes if not _is_scalar(n)]
    return cone


def _source(node: fx.Node) -> Source | None:
    if node.target is LINEAR:
        return Source(node, node)
    if node.target is operator.getitem and operand(node, 0).target in SPLITS:
        split = operand(node, 0)
        linear, pieces = operand(split, 0), split.meta["val"]
        if linear.target is LINEAR and _is_last(split, 2) and isinstance(node.args[1], int):
            return Source(linear, node, sum(int(p.shape[-1]) for p in pieces[: node.args[1]]))
    if node.target is not aten.slice.Tensor or operand(node, 0).target is not LINEAR:
        return None
    stepless = len(node.args) < 5 or node.args[4] == 1
    if stepless and _is_last(node, 1):
        return Source(operand(node, 0), node, int(node.args[2] or 0))  # type: ignore[arg-type]
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


def sum_behind(down: fx.Node) -> fx.Node | None:
    """Where a result is added to another tensor of its shape, scaled or normalised before at most."""
    node = down
    while True:
        users = [user for user in node.users if not _asks(user)]
        if len(users) != 1:
            return None
        (user,) = users
        if user.target in ADDS:
            others = [n for n in user.all_input_nodes if n is not node]
            if others and others[0].op != "placeholder":
                return user
        elif not (is_pointwise(user) or user.target in (*NORMS, *_MOVES)):
            return None
        node = user


# --- the activation -------------------------------------------------------------------------------

_CLOSE = 1e-5  # of the largest value: known activations differ by more, float32 rounds to less


def _form(ffn: FFN) -> Form | None:
    points = torch.linspace(-8, 8, 257, dtype=torch.float64)
    factor = points.flip(0).cos() + 2
    for bent, *rest in permutations(ffn.sources):
        given = {bent.node: points} | {source.node: factor for source in rest}
        values = _computed(ffn, given)
        if values is None:
            return None
        for name, act in ACTIVATIONS.items():
            if act is identity:  # a product of two linears has no activation
                continue
            active = act(points)
            if _close(values[ffn.hidden], active * factor if rest else active):
                made = (n for n, v in values.items() if n in ffn.inner and _close(v, active))
                return Form(name, bent, rest[0] if rest else None, next(made, None))
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.double() - wanted).abs().max() <= _CLOSE * wanted.abs().max())


def _computed(ffn: FFN, given: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor] | None:
    """Every value of a network, neuron by neuron, where the sources are ``given``; None if more is read."""
    values, made = {}, set[fx.Node]()
    for source in ffn.sources:
        made |= _down_to(source.node, source.linear)
        values[source.node] = given[source.node].clone()
    for node in ffn.hidden.graph.nodes:
        if node in ffn.inner and node not in made:
            if not values.keys() >= set(node.all_input_nodes):
                return None
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values
