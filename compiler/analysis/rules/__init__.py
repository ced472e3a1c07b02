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
    operator_name,
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
    """A reduction step of ours: the axis is a new one, and a second reduction would need its own sites."""
    for operand in tensor_operands(node):
        note_mix(axes, node, operand, range(1, len(axes.of(operand))), "already reduces it")


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
    "thresher::select_diverse", "thresher::redundant_merge", "thresher::restore_tokens",
    "thresher::soft_merge", "thresher::split_merge",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    **MOVED,
    **CUT,
    **PRODUCTS,
    **REDUCTIONS,
    **dict.fromkeys(_CREATED, _fresh),
    **dict.fromkeys(_REDUCING, _reduced),
}
