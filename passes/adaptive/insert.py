"""Adaptive modules put in place of feed-forward networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.cost import SHARE
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.adaptive.learners import Learners

aten = torch.ops.aten


def insert(
    program: Program,
    ffns: Sequence[FFN],
    modules: Sequence[Learners],
    shares: Sequence[float],
    made_by: str,
) -> ExportedProgram:
    """The graph with a gate and an ``adaptive_mlp`` for each network; its old weights leave.

    ``shares`` are the parts of the modules' work to expect, noted for the cost model.
    """
    rewriter = Rewriter(program, made_by)
    constants = {
        f"{name}_of_{ffn.down.name}": tensor.detach()
        for ffn, module in zip(ffns, modules, strict=True)
        for name, tensor in module.named_parameters()
    }
    at = {ffn.down: place for place, ffn in enumerate(ffns)}
    gone = frozenset[fx.Node]().union(*(ffn.inner for ffn in ffns))
    inputs, made = set(program.input_nodes()), dict[str, fx.Node]()
    for node in program.graph.nodes:
        if node.op == "output" or node in gone:
            continue
        if node in inputs and not made:
            made = {name: rewriter.constant(name, tensor) for name, tensor in constants.items()}
        if node not in at:
            rewriter.copy(node)
            continue
        place = at[node]
        _module(rewriter, ffns[place], modules[place].activation, shares[place], made)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    return rewriter.finish(outputs, constants, _unread(ffns))


def _module(
    rewriter: Rewriter, ffn: FFN, activation: str, share: float, made: Mapping[str, fx.Node]
) -> None:
    def weight(name: str) -> fx.Node:
        return made[f"{name}_of_{ffn.down.name}"]

    assert ffn.x is not None
    x = rewriter.map[ffn.x]
    rewriter.at(ffn.down)
    logits = rewriter.emit(aten.linear.default, x, weight("gate"), weight("gate_bias"))
    k = rewriter.emit(aten.argmax.default, logits, -1)
    rewriter.at(ffn.down, **{SHARE: share})
    y = rewriter.emit(
        torch.ops.thresher.adaptive_mlp.default,
        x, k, weight("w1"), weight("b1"), weight("w2"), activation,
    )  # fmt: skip
    rewriter.at(ffn.down)
    rewriter.map[ffn.down] = rewriter.emit(aten.add.Tensor, y, weight("bias"))


def _unread(ffns: Sequence[FFN]) -> frozenset[str]:
    """Weights of the old networks that nobody else reads."""
    old = {linear for ffn in ffns for linear in (*ffn.linears, ffn.down)}
    read = {weight for ffn in ffns for weight in ffn.weights}
    return frozenset(weight.name for weight in read if all(user in old for user in weight.users))
