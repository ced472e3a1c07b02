"""Linears of a graph: their operands, and the weights that are stored for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx

from thresher.compiler.program import Program, stored_tensors

LINEAR = torch.ops.aten.linear.default
Names: TypeAlias = dict[fx.Node, str]


def operand(node: fx.Node, position: int) -> fx.Node:
    """An operand that is a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found


def bias_of(linear: fx.Node) -> fx.Node | None:
    """The bias of a linear, if it has one."""
    found = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    return found if isinstance(found, fx.Node) else None


def stored_weights(program: Program) -> Names:
    """Placeholders of weights to the names under which they are stored."""
    signature = program.exported.graph_signature
    targets = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target}
    return {
        n: targets[n.name]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in targets
    }


def stored_values(program: Program) -> dict[fx.Node, Tensor]:
    """Placeholders of weights to what is stored for them, detached."""
    stored = stored_tensors(program.exported)
    names = stored_weights(program)
    return {node: stored[name].detach() for node, name in names.items() if name in stored}


def weights_of(program: Program, linears: Sequence[fx.Node]) -> list[Tensor]:
    """``[O, I]`` weights of linears, detached."""
    values = stored_values(program)
    return [values[operand(linear, 1)] for linear in linears]
