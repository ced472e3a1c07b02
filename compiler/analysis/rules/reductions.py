"""Reductions and look-ups by index."""

from __future__ import annotations

from torch import fx

from thresher.compiler.analysis.axes import Axes, size_of
from thresher.compiler.analysis.rules.operands import (
    Rule,
    argument_of,
    dims_of,
    note_mix,
    note_use,
    operand_of,
    unify,
)


def _reduce(kind: str, why: str, first: int = 1) -> Rule:
    """``first``: place of the ``dim`` argument, before ``keepdim``."""

    def rule(axes: Axes, node: fx.Node) -> None:
        operand = operand_of(node)
        source = axes.of(operand)
        given = dims_of(argument_of(node, first, "dim"))
        dims = {d % len(source) for d in given} if given else set(range(len(source)))
        keep = bool(argument_of(node, first + 1, "keepdim", False))
        for axis in dims:
            note_use(axes, node, operand, axis, kind, why=why)
        rest = [v for axis, v in enumerate(source) if axis not in dims]
        for out in axes.tensors(node):
            left = [v for axis, v in enumerate(out) if not keep or axis not in dims]
            if len(left) == len(rest):
                unify(axes, left, rest)

    return rule


def _index(axes: Axes, node: fx.Node) -> None:
    """``x[i, j, ...]``: the result's leading axes follow the index tensors, broadcast together."""
    operand, indices = operand_of(node), node.args[1]
    assert isinstance(indices, (list, tuple))
    source, out = axes.of(operand), axes.tensors(node)[0]
    used = [i for i, index in enumerate(indices) if isinstance(index, fx.Node)]
    note_mix(axes, node, operand, used, "looks it up by index")
    if used != list(range(len(used))):
        return
    tensors = [index for index in indices if isinstance(index, fx.Node)]
    rank = max(t.meta["val"].dim() for t in tensors)
    for tensor in tensors:
        for back, variable in enumerate(reversed(axes.of(tensor)), 1):
            if size_of(tensor.meta["val"].shape[-back]) != 1:
                axes.variables.union(out[rank - back], variable)
    unify(axes, out[rank:], source[len(used) :])


_REDUCED = (
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "any",
    "all",
    "argmax",
    "argmin",
    "max",
    "min",
)


REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys(_REDUCED, _reduce("mix", "reduces over it")),
    "linalg_vector_norm": _reduce("mix", "reduces over it", 2),
    "mean": _reduce("mean", "averages it"),
    "index": _index,
}
