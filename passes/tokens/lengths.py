"""Token counts among the arguments of a node: shapes, ends of slices, parts of splits."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from thresher.compiler.analysis.sites import TOKEN_AXIS, Sites
from thresher.compiler.operators import RESHAPES
from thresher.compiler.surgery import Rewriter
from thresher.passes.tokens.budget import Size

aten = torch.ops.aten
_SHAPED = (*RESHAPES, aten.expand.default)
_MADE = (aten.ones.default, aten.zeros.default, aten.full.default)
_TO_END = 2**63 - 1


class Lengths:
    """Rewrites arguments for a number of tokens that is not the model's."""

    def __init__(self, rewriter: Rewriter, sites: Sites) -> None:
        self.rewriter, self.sites = rewriter, sites

    def arguments(
        self, node: fx.Node, count: Size, replace: Mapping[fx.Node, fx.Node]
    ) -> tuple[Any, ...] | None:
        """Positional arguments with this token count, or None to take them as they are."""
        axes = self.sites.token_axes(node)
        mapped: Any = fx.node.map_arg(node.args, lambda n: replace.get(n) or self.rewriter.map[n])
        if node.target in _SHAPED:
            shape = [self._length(node, axis, size, count) for axis, size in enumerate(mapped[1])]
            return (mapped[0], shape, *mapped[2:])
        if node.target in _MADE:
            shape = [self._length(node, axis, size, count) for axis, size in enumerate(mapped[0])]
            return (shape, *mapped[1:])
        if node.target is aten.arange.default:
            return (self._length(node, 0, mapped[0], count), *mapped[1:])
        if node.target is torch.ops.thresher.prune_merge.default:
            operand, pruned = node.args[0], node.args[3]
            assert isinstance(operand, fx.Node)
            if pruned == operand.meta["val"].shape[TOKEN_AXIS]:  # nothing is pruned
                return (*mapped[:3], count, *mapped[4:])
        if node.target is aten.slice.Tensor and len(mapped) > 3:
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            axis = mapped[1] % operand.meta["val"].dim()
            source = self.sites.token_axes(operand)
            if axis in axes and axis in source:
                start = mapped[2]
                if isinstance(start, int) and start < 0:  # counted from the end that moves
                    start = source[axis] - axes[axis]
                return (*mapped[:2], start, _TO_END, *mapped[4:])
        if node.target is aten.split_with_sizes.default and isinstance(mapped[1][0], int):
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            axis = (mapped[2] if len(mapped) > 2 else 0) % operand.meta["val"].dim()
            source = self.sites.token_axes(operand)
            if axis in source:
                whole = self._plus(count, source[axis])
                return (mapped[0], [mapped[1][0], self._plus(whole, -mapped[1][0])], *mapped[2:])
        return None

    def _length(self, node: fx.Node, axis: int, given: Any, count: Size) -> Any:
        """Length of an output axis: recomputed where it is, or contains, a token axis."""
        offsets = self.sites.offsets
        variable = self.sites.axes.of(node)[axis]
        if variable in offsets:
            return self._plus(count, offsets[variable])
        factors = self.sites.axes.variables.factors(variable) or ()
        if not any(f in offsets for f in factors):
            return given
        length: Any = 1
        for factor in factors:
            size = self.sites.axes.variables.size(factor)
            part = self._plus(count, offsets[factor]) if factor in offsets else size
            if not isinstance(part, (int, fx.Node)):
                return -1
            length = part if length == 1 else self._times(length, part)
        return length

    def _plus(self, count: Size, offset: int) -> Size:
        if isinstance(count, int) or offset == 0:
            return count + offset if isinstance(count, int) else count
        return self.rewriter.emit(operator.add, count, offset)

    def _times(self, a: Size, b: Size) -> Size:
        return (
            a * b
            if isinstance(a, int) and isinstance(b, int)
            else self.rewriter.emit(operator.mul, a, b)
        )
