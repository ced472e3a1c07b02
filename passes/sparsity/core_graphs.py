"""The two graphs of a model with core neurons: one reads prompts and picks, one makes steps with what was picked."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.analysis.linears import bias_of, operand
from thresher.compiler.handed import CORE
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.sparsity.core_sets import chosen
from thresher.passes.sparsity.cut import rounded

aten = torch.ops.aten
Statistic = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Interface:
    """A graph with names of what it has more than the one that came in."""

    exported: ExportedProgram
    names: tuple[str, ...]


def prompt_graph(
    program: Program, ffns: Mapping[FFN, int], statistic: Statistic, made_by: str
) -> Interface:
    """The graph that also gives the weights of the K neurons that matter to its tokens, K by network.

    For network l: ``core.l.up.i`` ``[D, K]`` (and ``core.l.bias.i`` ``[K]``) of each linear that
    makes its hidden values, and ``core.l.down`` ``[K, O]``.
    """
    rewriter = Rewriter(program, made_by)
    for node in program.graph.nodes:
        if node.op != "output":
            rewriter.copy(node)
    mask = next((node for name, node in program.named_inputs() if name == "attention_mask"), None)
    handed: dict[str, fx.Node] = {}
    for ffn, keep in ffns.items():
        rewriter.at(ffn.down)
        hidden = rewriter.map[ffn.hidden]
        real = _real(rewriter, hidden, None if mask is None else rewriter.map[mask])
        scores = rewriter.inline(statistic, hidden, real)
        picked = rewriter.inline(partial(chosen, keep=keep), scores)
        for name, (place, axis) in _places(ffn).items():
            weight = rewriter.map[place]
            rows = rewriter.emit(aten.index_select.default, weight, axis, picked)
            one_axis = place.meta["val"].dim() == 1
            handed[name] = rows if one_axis else rewriter.emit(aten.transpose.int, rows, 0, 1)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    return Interface(rewriter.finish([*outputs, *handed.values()]), tuple(handed))


def step_graph(program: Program, ffns: Mapping[FFN, int], made_by: str) -> Interface:
    """The graph whose networks work with the weights that :func:`prompt_graph` gives, as more inputs."""
    rewriter = Rewriter(program, made_by)
    last = program.input_nodes()[-1]
    made: dict[str, fx.Node] = {}
    up = {linear: (ffn, i) for ffn in ffns for i, linear in enumerate(ffn.linears)}
    down = {ffn.down: ffn for ffn in ffns}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node in up:
            ffn, i = up[node]
            named = (f"{CORE}{ffn.layer}.up.{i}", f"{CORE}{ffn.layer}.bias.{i}")
            _product(rewriter, node, made[named[0]], made.get(named[1]))
        elif node in down:
            bias = bias_of(node)
            _product(
                rewriter,
                node,
                made[f"{CORE}{down[node].layer}.down"],
                None if bias is None else rewriter.map[bias],
            )
        else:
            rewriter.copy(node)
        if node is last:
            made = _inputs(rewriter, ffns)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    gone = frozenset(place.name for ffn in ffns for place, _ in _places(ffn).values())
    exported = rewriter.finish(outputs, dropped=gone, inputs=list(made.values()))
    return Interface(exported, tuple(made))


def _places(ffn: FFN) -> dict[str, tuple[fx.Node, int]]:
    """Weights and biases by the name they are handed on by, each with its axis of neurons."""
    found: dict[str, tuple[fx.Node, int]] = {}
    for i, linear in enumerate(ffn.linears):
        found[f"{CORE}{ffn.layer}.up.{i}"] = (operand(linear, 1), 0)
        bias = bias_of(linear)
        if bias is not None:
            found[f"{CORE}{ffn.layer}.bias.{i}"] = (bias, 0)
    return found | {f"{CORE}{ffn.layer}.down": (operand(ffn.down, 1), 1)}


def _inputs(rewriter: Rewriter, ffns: Mapping[FFN, int]) -> dict[str, fx.Node]:
    made = {}
    for ffn, keep in ffns.items():
        for name, (place, axis) in _places(ffn).items():
            value = place.meta["val"]
            shape = [keep if i == axis else int(size) for i, size in enumerate(value.shape)]
            made[name] = rewriter.input(name.replace(".", "_"), shape[::-1], value.dtype)
    return made


def _product(rewriter: Rewriter, node: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    rewriter.at(node)
    y = rewriter.emit(aten.matmul.default, rewriter.map[operand(node, 0)], weight)
    rewriter.map[node] = y if bias is None else rewriter.emit(aten.add.Tensor, y, bias)


def _real(rewriter: Rewriter, hidden: fx.Node, mask: fx.Node | None) -> fx.Node:
    """``[B, N]``: not 0 where a token is none of the padding, from the mask over past and new tokens."""
    if mask is None:
        return rewriter.inline(lambda h: torch.ones_like(h[..., 0]), hidden)
    total, new = rewriter.size(mask, 1), rewriter.size(hidden, 1)
    known = isinstance(total, int) and isinstance(new, int)
    start = total - new if known else rewriter.emit(operator.sub, total, new)  # type: ignore[operator]
    return rewriter.emit(aten.slice.Tensor, mask, 1, start, sys.maxsize)


def widths(ffns: Sequence[FFN], keep: float, multiple: int) -> dict[FFN, int]:
    """Neurons that stay in each network: a share, rounded up to a multiple."""
    return {ffn: rounded(keep * ffn.width, ffn.width, multiple) for ffn in ffns}
