"""What each operator says about the axes of its operands and results (see :mod:`..axes`).

One small function per kind of operator.  An operator without a rule mixes every axis it is given:
nothing is known about it, so nothing may change under it.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from thresher.compiler.analysis.axes import Axes, tensor_operands
from thresher.compiler.analysis.rules.cut import CUT
from thresher.compiler.analysis.rules.elementwise import ELEMENTWISE, pointwise
from thresher.compiler.analysis.rules.moved import MOVED, getitem
from thresher.compiler.analysis.rules.operands import (
    Rule,
    note_mix,
    note_use,
    operand_of,
    operator_name,
    unify,
    unknown,
)
from thresher.compiler.analysis.rules.products import PRODUCTS
from thresher.compiler.analysis.rules.reductions import REDUCTIONS


def apply_rule(axes: Axes, node: fx.Node) -> None:
    """State what ``node`` implies; unions and uses go into ``axes``."""
    if node.op == "output":
        for operand in node.all_input_nodes:
            if axes.has(operand):
                for axis in range(len(axes.of(operand))):
                    note_use(axes, node, operand, axis, "output")
        return
    if node.op != "call_function" or not axes.tensors(node):
        return
    if node.target is operator.getitem:
        getitem(axes, node)
        return
    rule = RULES.get(operator_name(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = pointwise
    (rule or unknown)(axes, node)


def _fresh(axes: Axes, node: fx.Node) -> None:
    """Creates a tensor from sizes: nothing is known until it is used."""


def _reduced(axes: Axes, node: fx.Node) -> None:
    """A reduction step of ours: the axis is a new one, and a second reduction would need its own sites.

    Of its results ``slot``, the last but one, has an entry for each token that comes, the others for each that leaves.
    """
    tokens = axes.of(operand_of(node))[1]
    for operand in tensor_operands(node):
        note_mix(axes, node, operand, range(1, len(axes.of(operand))), "already reduces it")
        axes.variables.union(axes.of(operand)[_token_axis(axes, operand)], tokens)
    *left, slot, kept = axes.tensors(node)
    axes.variables.union(slot[1], tokens)
    for result in (*left[1:], kept):
        axes.variables.union(result[1], left[0][1])


def _scored(axes: Axes, node: fx.Node) -> None:
    """A number for each key ``[B, H, N, d]``, the last operand of that rank."""
    operands = list(tensor_operands(node))
    keys = [axes.of(o) for o in operands if len(axes.of(o)) == 4][-1]
    (out,) = axes.tensors(node)
    unify(axes, out, (keys[0], keys[-2]))
    for operand in operands:
        note_mix(axes, node, operand, range(len(axes.of(operand))), "scores tokens by it")


def _token_axis(axes: Axes, operand: fx.Node) -> int:
    """``[B, N]``, ``[B, N, C]`` or ``[B, H, N, d]``."""
    return 1 if len(axes.of(operand)) == 2 else -2


def _gathered(axes: Axes, node: fx.Node) -> None:
    """Tokens ``[B, N, ...]`` by position ``[B, K]``."""
    operand, out = operand_of(node), axes.tensors(node)[0]
    unify(axes, out[:2], axes.of(operand_of(node, 1)))
    unify(axes, out[2:], axes.of(operand)[2:])
    note_mix(axes, node, operand, [0, 1], "looks it up by position")


def _restored(axes: Axes, node: fx.Node) -> None:
    """Tokens in the places that they had in the last operand."""
    unify(axes, axes.tensors(node)[0], axes.of(operand_of(node, 2)))
    for operand in tensor_operands(node):
        note_mix(axes, node, operand, range(1, len(axes.of(operand))), "puts it back")


_CREATED = (
    "full",
    "zeros",
    "ones",
    "empty",
    "arange",
    "scalar_tensor",
    "new_zeros",
    "new_ones",
    "new_full",
    "linspace",
    "eye",
)
_REDUCING = (
    "thresher::bipartite_merge", "thresher::keep_tokens", "thresher::prune_merge",
    "thresher::select_diverse", "thresher::redundant_merge", "thresher::soft_merge",
    "thresher::split_merge",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    **MOVED,
    **CUT,
    **PRODUCTS,
    **REDUCTIONS,
    **dict.fromkeys(_CREATED, _fresh),
    **dict.fromkeys(_REDUCING, _reduced),
    **dict.fromkeys(("thresher::class_attention", "thresher::token_energy"), _scored),
    "thresher::gather_tokens": _gathered,
    "thresher::restore_tokens": _restored,
}
