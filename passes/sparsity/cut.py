"""Linears made smaller: rows and columns of their weights left out, and the means folded into biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from thresher.compiler.analysis.ffn import FFN, SPLITS
from thresher.compiler.analysis.linears import LINEAR, bias_of, operand, stored_weights
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.sparsity.sites import Input

aten = torch.ops.aten


@dataclass(frozen=True)
class Channels:
    """Which channels of a tensor stay, and what stands for the others.

    ``keep``: int64, rising.  ``mean``: ``[C]``; a dropped channel counts as its mean, or as 0
    where this is None.
    """

    keep: Tensor
    mean: Tensor | None = None


@dataclass(frozen=True)
class Cuts:
    """What goes: neurons of networks, and channels of the inputs of linears."""

    neurons: Mapping[FFN, Channels]
    inputs: Mapping[Input, Channels]


def rounded(wanted: float, width: int, multiple: int) -> int:
    """A whole number of ``width`` channels, rounded up to a multiple; at least one."""
    count = max(1, int(-(-round(wanted, 6) // 1)))
    return min(width, -(-count // multiple) * multiple)


def apply(program: Program, cuts: Cuts, made_by: str) -> ExportedProgram:
    """The graph with smaller linears.

    ``W' = W[rows][:, keep]`` and ``b' = (b + W[:, gone] mean[gone])[rows]``, in float64 and cast
    back: variance-based pruning (2025) folds so, ``b2 += W2[:, i] E[h_i]``.
    """
    return _Cutting(program, cuts, made_by).run()


class _Cutting:
    def __init__(self, program: Program, cuts: Cuts, made_by: str) -> None:
        self.program, self.made_by, self.cuts = program, made_by, cuts
        self.rewriter = Rewriter(program, made_by)
        self.names = stored_weights(program)
        self.rows: dict[fx.Node, Tensor] = {}
        self.columns: dict[fx.Node, Channels] = {}
        self.width: dict[fx.Node, int] = {}
        self.gathered: dict[fx.Node, Tensor] = {}
        for ffn, kept in cuts.neurons.items():
            for linear in ffn.linears:
                starts = [s.start for s in ffn.sources if s.linear is linear]
                self.rows[linear] = torch.cat([kept.keep + start for start in starts])
            self.columns[ffn.down] = kept
            self.width |= dict.fromkeys(ffn.inner, len(kept.keep))
        for entry, kept in cuts.inputs.items():
            self.columns |= dict.fromkeys(entry.linears, kept)
            self.gathered |= dict.fromkeys(entry.linears, kept.keep)
        self.weights: dict[str, Tensor] = {}  # by stored name
        self.constants: dict[str, Tensor] = {}
        self.biases: dict[fx.Node, str] = {}  # linears without one to the constant
        for linear in dict.fromkeys([*self.rows, *self.columns]):
            self._shrink(linear)

    def run(self) -> ExportedProgram:
        inputs, made = set(self.program.input_nodes()), dict[str, fx.Node]()
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            if node in inputs and not made:
                made = {name: self.rewriter.constant(name, t) for name, t in self.constants.items()}
            if node.op == "placeholder":
                self._placeholder(node)
            elif node in self.rows or node in self.columns:
                self._linear(node, made)
            else:
                self.rewriter.copy(node, args=self._arguments(node))
        outputs = [self.rewriter.map[n] for n in self.program.output_nodes()]
        return self.rewriter.finish(outputs, self.constants, weights=self.weights)

    def _stored(self, node: fx.Node) -> Tensor:
        exported = self.program.exported
        found: Tensor = {**exported.constants, **exported.state_dict}[self.names[node]]
        return found

    def _shrink(self, linear: fx.Node) -> None:
        weight = self._stored(operand(linear, 1)).detach()
        bias_at = bias_of(linear)
        bias = None if bias_at is None else self._stored(bias_at).detach()
        columns, rows = self.columns.get(linear), self.rows.get(linear)
        if columns is not None:
            if columns.mean is not None:
                gone = torch.ones(weight.shape[1], dtype=torch.bool)
                gone[columns.keep] = False
                folded = weight[:, gone].double() @ columns.mean.double()[gone]
                bias = (folded + (0.0 if bias is None else bias.double())).to(weight.dtype)
            weight = weight[:, columns.keep]
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        self._put(operand(linear, 1), weight)
        if bias_at is not None and bias is not None:
            self._put(bias_at, bias)
        elif bias is not None:
            self.biases[linear] = f"folded_bias_{linear.name}"
            self.constants[self.biases[linear]] = bias
        if linear in self.gathered:
            name = f"channels_of_{operand(linear, 0).name}"
            self.constants[name] = self.gathered[linear]

    def _put(self, placeholder: fx.Node, tensor: Tensor) -> None:
        whole = tensor.contiguous()
        parameter = isinstance(self._stored(placeholder), torch.nn.Parameter)
        self.weights[self.names[placeholder]] = (
            torch.nn.Parameter(whole, False) if parameter else whole
        )

    def _placeholder(self, node: fx.Node) -> None:
        tensor = self.weights.get(self.names.get(node, ""))
        if tensor is None:
            self.rewriter.copy(node)
        else:
            self.rewriter.weight(node, tensor)

    def _linear(self, node: fx.Node, made: Mapping[str, fx.Node]) -> None:
        x, weight = (self.rewriter.map[operand(node, i)] for i in (0, 1))
        self.rewriter.at(node)
        if node in self.gathered:
            name = f"channels_of_{operand(node, 0).name}"
            x = self._selected(x, made[name])
        bias_at = bias_of(node)
        bias = made[self.biases[node]] if node in self.biases else None
        if bias_at is not None:
            bias = self.rewriter.map[bias_at]
        new = self.rewriter.call_like(node, (x, weight, bias), {}, LINEAR)
        new.meta["custom"] = {"thresher": {"pass": self.made_by, "replaces": True}}

    def _selected(self, x: fx.Node, channels: fx.Node) -> fx.Node:
        """The channels of ``x`` that stay, picked once for all linears that read them."""
        for user in channels.users:
            return user
        axis = x.meta["val"].dim() - 1
        return self.rewriter.emit(aten.index_select.default, x, axis, channels)

    def _arguments(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Arguments of a split or slice over neurons at their new number; None as they are."""
        width = self.width.get(node)
        if node.target is aten.slice.Tensor and width is not None:
            piece = int(node.args[2] or 0) // _width(node)  # type: ignore[arg-type]
            x = self.rewriter.map[operand(node, 0)]
            return (x, node.args[1], piece * width, (piece + 1) * width)
        if node.target in SPLITS and width is not None and node.target is not aten.chunk.default:
            x = self.rewriter.map[operand(node, 0)]
            listed = node.target is aten.split_with_sizes.default
            pieces = len(node.meta["val"])
            return (x, [width] * pieces if listed else width, *node.args[2:])
        return None


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])
