"""What each operator says about the axes of its operands and results (see :mod:`..axes`).

One small function per kind of operator.  An operator without a rule mixes every axis it is given:
nothing is known about it, so nothing may change under it.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from thresher.compiler.analysis.axes import Axes
from thresher.compiler.analysis.rules.cut import CUT
from thresher.compiler.analysis.rules.elementwise import ELEMENTWISE, pointwise
from thresher.compiler.analysis.rules.moved import MOVED, getitem
from thresher.compiler.analysis.rules.operands import (
    Rule,
    note_use,
    operator_name,
    unknown,
)
from thresher.compiler.analysis.rules.products import PRODUCTS
from thresher.compiler.analysis.rules.reductions import REDUCTIONS
from thresher.compiler.analysis.rules.steps import STEPS


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
RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    **MOVED,
    **CUT,
    **PRODUCTS,
    **REDUCTIONS,
    **dict.fromkeys(_CREATED, _fresh),
    **STEPS,
}
