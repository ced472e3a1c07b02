"""ReLUfication: the activations of feed-forward networks become ReLUs, and their weights learn to live with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import fx
from torch.export import ExportedProgram

from thresher.compiler.analysis.ffn import FFN, find
from thresher.compiler.contract import Context, Options, Pass, PassResult
from thresher.compiler.program import Program, Refusal
from thresher.compiler.surgery import Rewriter
from thresher.passes.learning import calibration
from thresher.passes.learning.options import JudgedBy, Patience, Rate
from thresher.passes.learning.schedule import thinned
from thresher.passes.sparsity.finetune import Finetuned, finetune
from thresher.passes.sparsity.quantiles import Quantiles

aten = torch.ops.aten
CALIBRATED_ON = 64  # items
NO_THRESHOLD = 1e-9  # what a quantile among exact zeros is


class RelufyOptions(Options):
    """Where the ReLU begins, and how the weights are trained."""

    sparsity: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="share of the activations that the threshold of FATReLU zeroes before training;"
            " by default a plain ReLU",
        ),
    ] = None
    steps: Annotated[int, Field(ge=0, description="most steps of training; 0 only swaps")] = 300
    rate: Rate = 5e-4
    loss: JudgedBy = "dense"
    patience: Patience = 100


class Relufy(Pass[RelufyOptions]):
    """GELU and SiLU of feed-forward networks become ``x if x > t else 0``, so that most neurons are exactly 0.

    ReLUfication (Mirzadeh et al., ICLR 2024) with t = 0, FATReLU (ProSparse, 2024) with t > 0.  The
    weights of these networks are then trained to give what the dense model gives, network by
    network and in the end; all others are frozen.
    """

    name = "relufy"
    summary = "ReLU in place of GELU and SiLU, and a short training of the feed-forward weights"
    Options = RelufyOptions
    needs_data = True
    trains = True

    def match(self, program: Program, context: Context) -> PassResult:
        """How many networks would be changed; no training."""
        swapped, refused = _sites(program)
        return PassResult(program, len(swapped) + len(refused), len(swapped), refused)

    def run(self, program: Program, context: Context) -> PassResult:
        curved, refused = _sites(program)
        matched = len(curved) + len(refused)
        if not curved:
            return PassResult(program, matched, 0, refused)
        thresholds = dict.fromkeys(curved, 0.0)
        if self.options.sparsity is not None:
            plain = dataclasses.replace(program, exported=swap(program, thresholds, self.name))
            thresholds = _calibrated(plain, thresholds, context, self.options.sparsity)
        exported = swap(program, thresholds, self.name)
        found = finetune(
            program, dataclasses.replace(program, exported=exported), [f.path for f in thresholds],
            self.options, context, self.name,
        )  # fmt: skip
        result = dataclasses.replace(program, exported=found.exported)
        details = _details(thresholds, found)
        return PassResult(result, matched, len(curved), refused, details)


def swap(program: Program, thresholds: Mapping[FFN, float], made_by: str) -> ExportedProgram:
    """The graph with ``x if x > t else 0`` for the activations of networks; names of their last nodes stay."""
    rewriter = Rewriter(program, made_by)
    places = {_active(ffn): ffn for ffn in thresholds}
    for node in program.graph.nodes:
        if node in places:
            form, t = places[node].form, thresholds[places[node]]
            assert form is not None
            rewriter.at(node)
            x, dtype = rewriter.map[form.bent.node], node.meta["val"].dtype
            if x.meta["val"].dtype != dtype:
                x = rewriter.emit(aten._to_copy.default, x, dtype=dtype)
            args, target = ((x, t, 0.0), aten.threshold.default) if t else ((x,), aten.relu.default)
            new = rewriter.call_like(node, args, {}, target)
            new.meta["custom"] = {"thresher": {"pass": made_by, "replaces": True}}
        elif node.op != "output":
            rewriter.copy(node)
    return rewriter.finish([rewriter.map[n] for n in program.output_nodes()])


def _sites(program: Program) -> tuple[list[FFN], tuple[Refusal, ...]]:
    """Networks whose activation can become a ReLU, and why others are left alone."""
    found, curved = find(program), list[FFN]()
    refused = list(found.refusals)
    for ffn in found.ffns:
        if ffn.form is None or ffn.form.activation == "relu":
            refused.append(
                Refusal(ffn.down.name, f"{ffn.path} is activated by neither GELU nor SiLU")
            )
        elif ffn.form.active is None:
            why = f"{ffn.path} multiplies before its {ffn.form.activation} is whole: no node is that alone"
            refused.append(Refusal(ffn.down.name, why))
        else:
            curved.append(ffn)
    return curved, tuple(refused)


def _active(ffn: FFN) -> fx.Node:
    assert ffn.form is not None
    assert ffn.form.active is not None
    return ffn.form.active


def _calibrated(
    plain: Program, thresholds: Mapping[FFN, float], context: Context, sparsity: float
) -> dict[FFN, float]:
    """Thresholds at which so large a share of the activations is zero on the data."""
    assert context.data is not None
    named = {node.name: node for node in plain.graph.nodes}
    nodes = {ffn: named[_active(ffn).name] for ffn in thresholds}
    sizes = {node: Quantiles() for node in nodes.values()}
    items = calibration.chosen_items(context.data, CALIBRATED_ON)
    calibration.collect(plain, context, items, sizes, "relufy-thresholds", {})
    found = {ffn: sizes[node].at(sparsity) for ffn, node in nodes.items()}
    return {ffn: t if t > NO_THRESHOLD else 0.0 for ffn, t in found.items()}


def _details(thresholds: Mapping[FFN, float], found: Finetuned) -> dict[str, Any]:
    """Zeros on held-out data and how the training went; plain data."""
    mean = sum(found.zeros) / len(found.zeros)
    swapped = sum(found.zeros_swapped) / len(found.zeros_swapped)
    return {
        "thresholds": {ffn.path: t for ffn, t in thresholds.items()},
        "exact_zeros": _by_path(thresholds, found.zeros),
        "exact_zeros_swapped": _by_path(thresholds, found.zeros_swapped),
        "training": {
            "loss": found.loss, "steps": len(found.history), "history": thinned(found.history),
        },
        "note": f"of the hidden activations {mean:.1%} are exactly zero on data held out, {swapped:.1%}"
        f" before the training of {len(found.history)} steps by {found.loss}",
    }  # fmt: skip


def _by_path(ffns: Iterable[FFN], values: Sequence[float]) -> dict[str, float]:
    return {ffn.path: value for ffn, value in zip(ffns, values, strict=True)}
