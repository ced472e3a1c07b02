"""Linears that skip small inputs, put in place of dense ones."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.cost import SHARE
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.analysis.linears import bias_of, operand, stored_values
from thresher.compiler.errors import RefusedError
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.sparsity.gated import GatedForm, gated_form

aten = torch.ops.aten
SHORT = 1024  # columns: in float32 a row of fewer does not fill a page of memory


@dataclass(frozen=True)
class Skip:
    """What the linears that read one tensor skip.

    Attributes:
        threshold: ``[I]`` float32; inputs of at most this size are skipped.
        shift: subtracted from the input first, ``W shift`` being added to the bias.
        by_gate: the network whose gate decides with its small values instead of the input with its own.
        active: expected share of the inputs that is needed where anything is skipped.
    """

    threshold: Tensor
    shift: float = 0.0
    by_gate: FFN | None = None
    active: float = 1.0

    @property
    def form(self) -> GatedForm | None:
        """Of a network that one operator computes from beginning to end."""
        return None if self.by_gate is None else gated_form(self.by_gate)


def insert(
    program: Program,
    skips: Mapping[tuple[fx.Node, ...], Skip],
    most_tokens: int,
    made_by: str,
    *,
    narrow: bool = False,
) -> ExportedProgram:
    """The graph with ``sparse_linear`` in place of the given groups of linears.

    Each group reads one tensor and has one Skip.  Weights are kept as ``[I, O]``, so that a skipped
    input skips a row; short rows of a group stand side by side, as one operator.  A network that is
    skipped by its gate becomes one ``sparse_gated_ffn`` where it has that form; elsewhere its hidden
    tensor is masked by the gate, and only rows of down are skipped.
    ``narrow`` weights are kept in bfloat16.

    Raises:
        RefusedError: weights that are no float32 are to be narrow.
    """
    rewriter = Rewriter(program, made_by)
    skips = {part: skip for linears, skip in skips.items() for part in _joined(linears)}
    first = {linears[0]: linears for linears in skips}
    of = {linear: skip for linears, skip in skips.items() for linear in linears}
    forms = {linear: form for linear, skip in of.items() if (form := skip.form) is not None}
    constants = _constants(program, skips, forms, narrow)
    inputs, made = set(program.input_nodes()), dict[str, fx.Node]()
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node in inputs and not made:
            made = {name: rewriter.constant(name, tensor) for name, tensor in constants.items()}
        if node in first:
            _replace(rewriter, first[node], of[node], forms.get(node), made, most_tokens)
        elif node not in of:
            rewriter.copy(node)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    gone = {*of, *(linear for form in forms.values() for linear in form.linears)}
    unread = {operand(n, 1) for n in gone} | {
        b for n, s in of.items() if s.shift and (b := bias_of(n))
    }
    dropped = frozenset(p.name for p in unread if all(u in gone for u in p.users))
    return rewriter.finish(outputs, constants, dropped)


def _joined(linears: tuple[fx.Node, ...]) -> list[tuple[fx.Node, ...]]:
    """Linears of one input as one, where rows are short: a prompt pays for it by a copy of the result."""
    short = any(linear.meta["val"].shape[-1] < SHORT for linear in linears)
    return [linears] if short else [(linear,) for linear in linears]


def _constants(
    program: Program,
    skips: Mapping[tuple[fx.Node, ...], Skip],
    forms: Mapping[fx.Node, GatedForm],
    narrow: bool,
) -> dict[str, Tensor]:
    """Weights by input and thresholds by group, and shifted biases, by name."""

    def kept(weight: Tensor, linear: fx.Node) -> Tensor:
        if narrow and weight.dtype != torch.float32:
            raise RefusedError(
                f"{linear.name} has weights in {weight.dtype} and only float32 ones can be kept in"
                " bfloat16: leave weights=bfloat16 out"
            )
        return (weight.bfloat16() if narrow else weight).contiguous()

    values, constants = stored_values(program), dict[str, Tensor]()
    for linears, skip in skips.items():
        weights, name = [values[operand(linear, 1)] for linear in linears], linears[0].name
        constants[f"by_input_{name}"] = kept(torch.cat(weights).T, linears[0])
        constants[f"threshold_{name}"] = skip.threshold.float()
        for linear, weight in zip(linears, weights, strict=True) if skip.shift else ():
            bias, bias_at = weight.double().sum(1) * skip.shift, bias_of(linear)
            if bias_at is not None:
                bias = bias + values[bias_at].double()
            constants[f"shifted_bias_{linear.name}"] = bias.to(weight.dtype)
        if linears[0] in forms:
            form = forms[linears[0]]
            gate, up = (
                values[operand(source.linear, 1)][source.start :][: len(skip.threshold)]
                for source in (form.gate, form.up)
            )
            constants[f"gate_by_input_{name}"] = kept(gate.T, linears[0])
            constants[f"up_by_neuron_{name}"] = kept(up, linears[0])
    return constants


def _replace(
    rewriter: Rewriter,
    linears: Sequence[fx.Node],
    skip: Skip,
    form: GatedForm | None,
    made: Mapping[str, fx.Node],
    most_tokens: int,
) -> None:
    node = linears[0]
    rewriter.at(node, **{SHARE: skip.active})
    threshold, weight = made[f"threshold_{node.name}"], made[f"by_input_{node.name}"]
    if form is not None:
        gate, up = made[f"gate_by_input_{node.name}"], made[f"up_by_neuron_{node.name}"]
        layer, x = torch.ops.thresher.sparse_gated_ffn.default, rewriter.map[form.x]
        y = rewriter.emit(layer, x, gate, up, weight, threshold, form.activation, most_tokens)
    else:
        x = rewriter.map[operand(node, 0)]
        if skip.by_gate is not None and skip.by_gate.gate is not None:
            x = _masked(rewriter, x, rewriter.map[skip.by_gate.gate], threshold, most_tokens)
            threshold = rewriter.inline(torch.zeros_like, threshold)
        if skip.shift:
            x = rewriter.emit(aten.sub.Tensor, x, skip.shift)
        layer = torch.ops.thresher.sparse_linear.default
        y = rewriter.emit(layer, x, weight, threshold, most_tokens)
    parts = _split(rewriter, y, [linear.meta["val"].shape[-1] for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        rewriter.at(linear)
        bias_at = bias_of(linear)
        if skip.shift:
            part = rewriter.emit(aten.add.Tensor, part, made[f"shifted_bias_{linear.name}"])
        elif bias_at is not None:
            part = rewriter.emit(aten.add.Tensor, part, rewriter.map[bias_at])
        rewriter.map[linear] = part


def _split(rewriter: Rewriter, y: fx.Node, sizes: Sequence[int]) -> list[fx.Node]:
    """``[..., O]`` at its last axis, if there is something to split."""
    if len(sizes) == 1:
        return [y]
    return rewriter.outputs(rewriter.emit(aten.split_with_sizes.default, y, list(sizes), -1))


def _masked(
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
