"""Other networks put in place of feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.cost import SHARE
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.adaptive.learners import Learners

aten = torch.ops.aten
Weights = Mapping[str, fx.Node]
Write = Callable[
    [Rewriter, FFN, fx.Node, Weights], fx.Node
]  # of what a network reads: what it writes


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
    weights = [dict(module.named_parameters()) for module in modules]
    writes = [
        partial(_module, module=module, share=share)
        for module, share in zip(modules, shares, strict=True)
    ]
    return put_in_place(program, ffns, weights, writes, {}, made_by)


def put_in_place(
    program: Program,
    ffns: Sequence[FFN],
    weights: Sequence[Mapping[str, Tensor]],
    writes: Sequence[Write],
    shared: Mapping[str, Tensor],
    made_by: str,
) -> ExportedProgram:
    """The graph with what ``writes`` emit for each network; its old weights leave.

    ``weights`` are constants of one network each, ``shared`` those of all; a network's function sees both by
    name.
    """
    rewriter = Rewriter(program, made_by)
    constants = {name: tensor.detach() for name, tensor in shared.items()}
    for ffn, own in zip(ffns, weights, strict=True):
        constants |= {f"{name}_of_{ffn.down.name}": t.detach() for name, t in own.items()}
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
        ffn, own = ffns[at[node]], weights[at[node]]
        named = {name: made[f"{name}_of_{ffn.down.name}"] for name in own}
        named |= {name: made[name] for name in shared}
        assert ffn.x is not None
        rewriter.at(node)
        rewriter.map[node] = writes[at[node]](rewriter, ffn, rewriter.map[ffn.x], named)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    return rewriter.finish(outputs, constants, _unread(ffns))


def _module(
    rewriter: Rewriter, ffn: FFN, x: fx.Node, weights: Weights, module: Learners, share: float
) -> fx.Node:
    logits = rewriter.emit(aten.linear.default, x, weights["gate"], weights["gate_bias"])
    k = rewriter.emit(aten.argmax.default, logits, -1)
    rewriter.at(ffn.down, **{SHARE: share})
    ours = torch.ops.thresher
    layer = ours.adaptive_gated_mlp if module.gated else ours.adaptive_mlp
    operands = [weights[name] for name in module.operands]
    y = rewriter.emit(layer.default, x, k, *operands, module.activation)
    rewriter.at(ffn.down)
    return rewriter.emit(aten.add.Tensor, y, weights["bias"])


def _unread(ffns: Sequence[FFN]) -> frozenset[str]:
    """Weights of the old networks that nobody else reads."""
    old = {linear for ffn in ffns for linear in (*ffn.linears, ffn.down)}
    read = {weight for ffn in ffns for weight in ffn.weights}
    return frozenset(weight.name for weight in read if all(user in old for user in weight.users))
