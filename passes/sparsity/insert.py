"""Linears that skip small inputs, put in place of dense ones."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.linears import bias_of, operand, stored_weights, weights_of
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class Skip:
    """What the linears that read one tensor skip.

    Attributes:
        threshold: ``[I]`` float32; inputs of at most this size are skipped.
        shift: subtracted from the input first, ``W shift`` being added to the bias.
        gate: a node ``[..., I]`` whose small values decide instead of the input's own.
    """

    threshold: Tensor
    shift: float = 0.0
    gate: fx.Node | None = None


def insert(
    program: Program, skips: Mapping[tuple[fx.Node, ...], Skip], most_tokens: int, made_by: str
) -> ExportedProgram:
    """The graph with ``sparse_linear`` in place of the given groups of linears.

    Each group reads one tensor and has one Skip.  Weights are kept as ``[I, O]``, so that a skipped
    input skips a row.
    """
    rewriter = Rewriter(program, made_by)
    of = {linear: skip for linears, skip in skips.items() for linear in linears}
    names = stored_weights(program)
    constants: dict[str, Tensor] = {}
    for linear, weight in zip(of, weights_of(program, list(of)), strict=True):
        skip, bias_at = of[linear], bias_of(linear)
        constants[f"by_input_{linear.name}"] = weight.T.contiguous()
        constants[f"threshold_{linear.name}"] = skip.threshold.float()
        if skip.shift:
            bias = weight.double().sum(1) * skip.shift
            if bias_at is not None:
                stored = {**program.exported.constants, **program.exported.state_dict}
                bias = bias + stored[names[bias_at]].detach().double()
            constants[f"shifted_bias_{linear.name}"] = bias.to(weight.dtype)
    inputs, made = set(program.input_nodes()), dict[str, fx.Node]()
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node in inputs and not made:
            made = {name: rewriter.constant(name, tensor) for name, tensor in constants.items()}
        if node in of:
            _replace(rewriter, node, of[node], made, most_tokens)
        else:
            rewriter.copy(node)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    unread = {operand(n, 1) for n in of} | {
        b for n, s in of.items() if s.shift and (b := bias_of(n))
    }
    dropped = frozenset(p.name for p in unread if all(u in of for u in p.users))
    return rewriter.finish(outputs, constants, dropped)


def _replace(
    rewriter: Rewriter, node: fx.Node, skip: Skip, made: Mapping[str, fx.Node], most_tokens: int
) -> None:
    x = rewriter.map[operand(node, 0)]
    rewriter.at(node)
    threshold = made[f"threshold_{node.name}"]
    if skip.gate is not None:
        x = _gated(rewriter, x, rewriter.map[skip.gate], threshold, most_tokens)
        threshold = rewriter.inline(torch.zeros_like, threshold)
    if skip.shift:
        x = rewriter.emit(aten.sub.Tensor, x, skip.shift)
    weight = made[f"by_input_{node.name}"]
    y = rewriter.emit(torch.ops.thresher.sparse_linear.default, x, weight, threshold, most_tokens)
    bias_at = bias_of(node)
    if skip.shift:
        y = rewriter.emit(aten.add.Tensor, y, made[f"shifted_bias_{node.name}"])
    elif bias_at is not None:
        y = rewriter.emit(aten.add.Tensor, y, rewriter.map[bias_at])
    rewriter.map[node] = y


def _gated(
    rewriter: Rewriter, x: fx.Node, gate: fx.Node, threshold: fx.Node, most_tokens: int
) -> fx.Node:
    """``x`` with zeros where the gate is small, if there are few tokens; NaN in the gate keeps x."""
    tokens: fx.Node | int = 1
    for axis in range(x.meta["val"].dim() - 1):
        size = rewriter.size(x, axis)
        both_known = isinstance(tokens, int) and isinstance(size, int)
        tokens = tokens * size if both_known else rewriter.emit(operator.mul, tokens, size)  # type: ignore[operator]
    if isinstance(tokens, int):
        if tokens > most_tokens:
            return x
    else:  # 1 where there are few tokens and 0 where there are many
        room = rewriter.emit(operator.sub, most_tokens + 1, tokens)
        few = rewriter.emit(torch.sym_max, rewriter.emit(torch.sym_min, room, 1), 0)
        threshold = rewriter.emit(aten.mul.Tensor, threshold, few)

    def drop(x: Tensor, gate: Tensor, threshold: Tensor) -> Tensor:
        return torch.where(gate.abs() <= threshold, torch.zeros_like(x), x)

    return rewriter.inline(drop, x, gate, threshold)
