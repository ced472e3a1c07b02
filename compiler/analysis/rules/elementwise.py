"""Operators whose result has the shape of their operands."""

from __future__ import annotations

from torch import fx

from thresher.compiler.analysis.axes import Axes, size_of, tensor_operands
from thresher.compiler.analysis.rules.operands import (
    Rule,
    argument_of,
    dims_of,
    note_mix,
    operand_of,
    unify,
)


def pointwise(axes: Axes, node: fx.Node) -> None:
    """Operands are broadcast against each other."""
    for out in axes.tensors(node):
        for operand in tensor_operands(node):
            shape = operand.meta["val"].shape
            for back, (size, variable) in enumerate(
                zip(reversed(shape), reversed(axes.of(operand)), strict=True), 1
            ):
                if back <= len(out) and size_of(size) != 1:
                    axes.variables.union(out[-back], variable)


def _same(axes: Axes, node: fx.Node) -> None:
    unify(axes, axes.tensors(node)[0], axes.of(operand_of(node)))


def _adaptive(axes: Axes, node: fx.Node) -> None:
    """Tokens one by one, each with its own count."""
    _same(axes, node)
    unify(axes, axes.of(operand_of(node))[:2], axes.of(operand_of(node, 1)))


def _over(dim_position: int, why: str) -> Rule:
    def rule(axes: Axes, node: fx.Node) -> None:
        _same(axes, node)
        note_mix(
            axes, node, operand_of(node), dims_of(argument_of(node, dim_position, "dim", -1)), why
        )

    return rule


def _trailing_norm(axes: Axes, node: fx.Node) -> None:
    _same(axes, node)
    shape = argument_of(node, 1, "normalized_shape")
    assert isinstance(shape, (list, tuple))
    note_mix(axes, node, operand_of(node), range(-len(shape), 0), "normalises over it")


def _channel_norm(axes: Axes, node: fx.Node) -> None:
    operand = operand_of(node)
    unify(axes, axes.tensors(node)[0], axes.of(operand))
    note_mix(axes, node, operand, range(2, len(axes.of(operand))), "normalises over it")


_SAME = (
    "clone", "contiguous", "detach", "alias", "dropout", "to", "_to_copy", "gelu", "silu", "relu", "type_as",
    "masked_fill", "where", "lift_fresh_copy", "native_dropout", "zeros_like", "ones_like", "full_like",
    "empty_like", "bernoulli", "pow", "_assert_tensor_metadata", "copy", "__and__", "__or__", "__xor__",
)  # fmt: skip


ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(_SAME, pointwise),
    **dict.fromkeys(
        ("softmax", "_softmax", "log_softmax", "_log_softmax"), _over(1, "takes a softmax over it")
    ),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), _over(1, "accumulates along it")),
    **dict.fromkeys(("flip", "roll"), _over(2, "reorders it")),
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm"), _trailing_norm),
    **dict.fromkeys(("group_norm", "instance_norm"), _channel_norm),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _same),
    **dict.fromkeys(("thresher::adaptive_mlp", "thresher::adaptive_gated_mlp"), _adaptive),
}
