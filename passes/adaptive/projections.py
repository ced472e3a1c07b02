"""The linears around attention, as sites of adaptive modules.

Wójcik et al. (AAAI 2025) replace all of them.  What attention reads is ``qkv``, what reads attention ``out``.
One linear that makes queries, keys and values side by side is first cut into linears that keep the
width, each of which is a site.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from thresher.compiler.analysis.ffn import refuse
from thresher.compiler.analysis.linears import (
    LINEAR,
    bias_of,
    operand,
    stored_values,
    stored_weights,
)
from thresher.compiler.program import Program, Refusal, module_path
from thresher.compiler.surgery import Rewriter
from thresher.passes.sparsity import sites as linears

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """One linear ``[B, N, D] -> [B, N, D]``, a :class:`~thresher.passes.adaptive.sites.Site`.

    Attributes:
        rank: of what all its learners together compute, at most D.
    """

    layer: int
    path: str
    down: fx.Node
    rank: int
    inner: frozenset[fx.Node] = frozenset()
    activation: str = "identity"

    @property
    def x(self) -> fx.Node:
        """What it reads."""
        return operand(self.down, 0)

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """Itself."""
        return (self.down,)

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        """Placeholders of its matrix and its bias."""
        return _weights(self.down)

    @property
    def width(self) -> int:
        """D, the rank of a linear that keeps everything."""
        return _shape(self.down)[0]


def projections(
    program: Program, kinds: Collection[str], learners: int, rank: float, start: int
) -> tuple[list[Projection], list[Refusal]]:
    """Linears of the kinds ``qkv`` and ``out``, numbered from ``start``, and why others are left alone.

    ``rank`` is a share of D, rounded down to equal parts for all learners.
    """
    chosen, alike = _chosen(program, kinds)
    paths = [module_path(linear) or linear.name for linear in chosen]
    fits, refused = list[Projection](), alike
    if not chosen and not alike:
        refused.append(Refusal("(graph)", f"no linear of attention was found ({', '.join(kinds)})"))
    for place, linear in enumerate(chosen):
        results, width = _shape(linear)
        hidden, path = int(rank * width) // learners, paths[place]
        problem = _unfit(program, linear)
        if problem is None and results != width:
            problem = f"maps {width} values to {results}, and learners keep the width"
        if problem is None and not hidden:
            problem = (
                f"keeps rank {int(rank * width)} of {width}, which {learners} learners cannot share:"
                " set a larger rank or fewer learners"
            )
        if problem is not None:
            refused.append(refuse(linear, problem))
            continue
        if paths.count(path) > 1:
            path = f"{path}[{paths[:place].count(path)}]"
        fits.append(Projection(start + len(fits), path, linear, hidden * learners))
    return fits, refused


def unfused(program: Program, kinds: Collection[str], made_by: str) -> Program:
    """Each linear ``D -> m D`` of these kinds as m linears that keep the width, and a concatenation."""
    stored, wide = stored_values(program), dict[fx.Node, int]()
    for linear in _chosen(program, kinds)[0]:
        results, width = _shape(linear)
        if results > width and results % width == 0 and _unfit(program, linear) is None:
            wide[linear] = results // width
    if not wide:
        return program
    constants = {
        f"{weight.name}_{place}": piece.clone()
        for linear, pieces in wide.items()
        for weight in _weights(linear)
        for place, piece in enumerate(stored[weight].chunk(pieces))
    }
    rewriter, made = Rewriter(program, made_by), dict[str, fx.Node]()
    inputs = set(program.input_nodes())
    for node in program.graph.nodes:
        if node in inputs and not made:
            made = {name: rewriter.constant(name, tensor) for name, tensor in constants.items()}
        if node in wide:
            rewriter.map[node] = _side_by_side(rewriter, node, wide[node], made)
        elif node.op != "output":
            rewriter.copy(node)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    gone = frozenset(weight.name for linear in wide for weight in _weights(linear))
    return replace(program, exported=rewriter.finish(outputs, constants, gone))


def _side_by_side(
    rewriter: Rewriter, linear: fx.Node, pieces: int, made: Mapping[str, fx.Node]
) -> fx.Node:
    rewriter.at(linear)
    x, weights = rewriter.map[operand(linear, 0)], _weights(linear)
    parts = [
        rewriter.emit(LINEAR, x, *(made[f"{weight.name}_{place}"] for weight in weights))
        for place in range(pieces)
    ]
    return rewriter.emit(aten.cat.default, parts, -1)


def _chosen(program: Program, kinds: Collection[str]) -> tuple[list[fx.Node], list[Refusal]]:
    """Linears of these kinds in program order, and refusals of those whose kind is not clear."""
    found = linears.find(program)
    wanted = {linear for entry in found.inputs if entry.kind in kinds for linear in entry.linears}
    return [node for node in program.graph.nodes if node in wanted], found.alike


def _unfit(program: Program, linear: fx.Node) -> str | None:
    """Why nothing else can stand in a linear's place."""
    stored = stored_weights(program)
    for weight in _weights(linear):
        if weight not in stored:
            return f"has a bias that is computed ({weight.name})"
        other = next((user for user in weight.users if user is not linear), None)
        if other is not None:
            return f"shares its weight with {other.name}"
    if operand(linear, 0).meta["val"].dim() != 3:
        return "reads no tokens [B, N, D]"
    return None


def _weights(linear: fx.Node) -> tuple[fx.Node, ...]:
    bias = bias_of(linear)
    return (operand(linear, 1), *(() if bias is None else (bias,)))


def _shape(linear: fx.Node) -> tuple[int, int]:
    """``(O, I)`` of a linear's matrix."""
    results, width = operand(linear, 1).meta["val"].shape
    return int(results), int(width)
