"""Plain feed-forward networks by data flow: linear, activation, linear, back to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from thresher.compiler.program import Program, Refusal, module_path

aten = torch.ops.aten
LINEAR = aten.linear.default
_MOVES = (aten.clone.default, aten._to_copy.default, aten.alias.default)


@dataclass(frozen=True)
class FFN:
    """One feed-forward network ``down(act(up(x)))``.

    Attributes:
        layer: its number among those found, from 0.
        path: the module that it stands in.
        up, down: its linears; what ``up`` reads is ``[B, N, D]``.
        hidden: ``[B, N, H]``, what ``down`` reads.
        inner: nodes from ``up`` to ``hidden``, which nobody else reads.
        activation: name among the activations of ``adaptive_mlp``.
    """

    layer: int
    path: str
    up: fx.Node
    down: fx.Node
    hidden: fx.Node
    inner: frozenset[fx.Node]
    activation: str

    @property
    def x(self) -> fx.Node:
        return operand(self.up, 0)

    @property
    def width(self) -> int:
        """Neurons."""
        return int(self.hidden.meta["val"].shape[-1])


@dataclass
class Found:
    """What a search found; what looked like a feed-forward network and is none is refused."""

    ffns: list[FFN] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def find(program: Program) -> Found:
    """Search a Program; never raises."""
    found, stored = Found(), tensors(program)
    for node in program.graph.nodes:
        if node.target is not LINEAR:
            continue
        inner = list(_back_to_linear(node))
        if len(inner) < 2:
            continue
        made = _ffn(node, inner, len(found.ffns), stored)
        if isinstance(made, FFN):
            found.ffns.append(made)
        else:
            found.refusals.append(made)
    if not found.ffns and not found.refusals:
        reason = "no plain feed-forward network was found (linear, activation, linear)"
        found.refusals.append(Refusal("(graph)", reason))
    return found


def operand(node: fx.Node, position: int) -> fx.Node:
    """An operand that is a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found


def bias_of(linear: fx.Node) -> fx.Node | None:
    """The bias of a linear, if it has one."""
    found = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    return found if isinstance(found, fx.Node) else None


def tensors(program: Program) -> dict[fx.Node, Tensor]:
    """Placeholders of weights with what is stored for them, detached."""
    signature = program.exported.graph_signature
    stored: dict[str, Any] = {**program.exported.constants, **program.exported.state_dict}
    by_name = {s.arg.name: stored[s.target] for s in signature.input_specs if s.target in stored}
    return {
        node: by_name[node.name].detach()
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(by_name.get(node.name), Tensor)
    }


def _back_to_linear(down: fx.Node) -> Iterator[fx.Node]:
    """From what a linear reads back to the linear that makes it; nothing if it is not made so."""
    chain, node = list[fx.Node](), operand(down, 0)
    while node.target in _MOVES or _activation(node) is not None:
        chain.append(node)
        node = operand(node, 0)
    if node.target is LINEAR and any(_activation(one) for one in chain):
        yield from [*chain, node]


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    names = {aten.relu.default: "relu", aten.silu.default: "silu"}
    target: Any = node.target
    return names.get(target) if node.op == "call_function" else None


def _ffn(
    down: fx.Node, chain: list[fx.Node], layer: int, stored: dict[fx.Node, Tensor]
) -> FFN | Refusal:
    up, names = chain[-1], [name for node in chain if (name := _activation(node))]
    x, y = operand(up, 0).meta["val"], down.meta["val"]
    if len(names) > 1:
        return _refuse(down, "has several activations in a row")
    if x.dim() != 3 or x.shape[-1] != y.shape[-1]:
        return _refuse(down, "is no map of tokens [B, N, D] to such")
    if not _returns(down):
        return _refuse(down, "does not return to a residual stream (a pooler or a head)")
    for linear in (up, down):
        weight = operand(linear, 1)
        if weight not in stored:
            return _refuse(linear, f"has a weight that is computed ({weight.name})")
        other = next((user for user in weight.users if user is not linear), None)
        if other is not None:
            return _refuse(linear, f"shares its weight with {other.name}")
        bias = bias_of(linear)
        if bias is not None and bias not in stored:
            return _refuse(linear, f"has a bias that is computed ({bias.name})")
    for node in chain:
        other = next((user for user in node.users if user not in (*chain, down)), None)
        if other is not None:
            return _refuse(node, f"is also read by {other.name}, outside of the network")
    path = module_path(down) or down.name
    return FFN(layer, path, up, down, operand(down, 0), frozenset(chain), names[0])


def _refuse(node: fx.Node, why: str) -> Refusal:
    return Refusal(node.name, f"{module_path(node) or node.name} {why}")


def _returns(down: fx.Node) -> bool:
    """Whether a result is added to another tensor, scaled elementwise before at most."""
    node = down
    while len(users := [u for u in node.users if u.target is not aten.sym_size.int]) == 1:
        (user,) = users
        others = [n for n in user.all_input_nodes if n is not node]
        if user.target in (aten.add.Tensor, aten.add_.Tensor):
            if others and others[0].op != "placeholder":
                return True
        elif not (torch.Tag.pointwise in getattr(user.target, "tags", ()) or user.target in _MOVES):
            return False
        node = user
    return False
