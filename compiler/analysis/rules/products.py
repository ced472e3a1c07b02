"""Products, attention and what else adds up along an axis by weights."""

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
    unknown,
)


def _linear(axes: Axes, node: fx.Node) -> None:
    operand, weight = operand_of(node), operand_of(node, 1)
    out, source = axes.tensors(node)[0], axes.of(operand)
    unify(axes, out[:-1], source[:-1])
    axes.variables.union(out[-1], axes.of(weight)[0])
    note_mix(axes, node, operand, [-1], "multiplies it by a weight")


def _gate(axes: Axes, node: fx.Node) -> None:
    """A linear and the place of the largest of its results."""
    operand = operand_of(node)
    unify(axes, axes.tensors(node)[0], axes.of(operand)[:-1])
    note_mix(axes, node, operand, [-1], "multiplies it by a weight")


def _sparse(last: int) -> Rule:
    """As linears, whose ``last`` weight is ``[.., outputs]``; how many tokens there are in all decides."""

    def rule(axes: Axes, node: fx.Node) -> None:
        operand, out = operand_of(node), axes.tensors(node)[0]
        unify(axes, out[:-1], axes.of(operand)[:-1])
        axes.variables.union(out[-1], axes.of(operand_of(node, last))[1])
        note_mix(axes, node, operand, [-1], "multiplies it by a weight")

    return rule


def _matmul(axes: Axes, node: fx.Node) -> None:
    a, b = operand_of(node), operand_of(node, 1)
    left, right, out = axes.of(a), axes.of(b), axes.tensors(node)[0]
    if len(left) < 2 or len(right) < 2:
        unknown(axes, node)
        return
    axes.variables.union(left[-1], right[-2])
    axes.variables.union(out[-2], left[-2])
    axes.variables.union(out[-1], right[-1])
    for operand, source in ((a, left), (b, right)):
        for back in range(3, len(source) + 1):
            if size_of(operand.meta["val"].shape[-back]) != 1:
                axes.variables.union(out[-back], source[-back])
    note_mix(axes, node, a, [-1], "sums over it in a matrix product")
    note_mix(axes, node, b, [-2], "sums over it in a matrix product")


def _attention(axes: Axes, node: fx.Node) -> None:
    q, k, v = (operand_of(node, i) for i in range(3))
    out = axes.tensors(node)[0]
    vq, vk, vv = axes.of(q), axes.of(k), axes.of(v)
    axes.variables.union(out[-2], vq[-2])
    axes.variables.union(out[-1], vv[-1])
    axes.variables.union(vk[-2], vv[-2])
    axes.variables.union(vq[-1], vk[-1])
    for variables in (vq, vk, vv):
        for i in range(len(variables) - 2):
            axes.variables.union(out[i], variables[i])
    mask = argument_of(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        full = [*out[:-2], vq[-2], vk[-2]]
        shape = mask.meta["val"].shape
        for back, variable in enumerate(reversed(axes.of(mask)), 1):
            if size_of(shape[-back]) != 1:
                axes.variables.union(full[-back], variable)
    note_use(axes, node, q, len(vq) - 2, "query")
    note_use(axes, node, k, len(vk) - 2, "key")
    if argument_of(node, 5, "is_causal", False):
        note_mix(axes, node, q, [-2], "is causal: a token's order decides what it sees")


def _convolution(axes: Axes, node: fx.Node) -> None:
    operand = operand_of(node)
    out, source = axes.tensors(node)[0], axes.of(operand)
    mixed = range(1, len(source))
    if len(out) == len(source):
        axes.variables.union(out[0], source[0])
    if _is_pointwise(node):
        unify(axes, out[2:], source[2:])
        mixed = range(1, 2)
    note_mix(axes, node, operand, mixed, "is a convolution over it")


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a convolution is a linear at each place: kernel and stride one, no padding."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node):
        return False  # pooling: its kernel is a list
    steps = [
        *dims_of(argument_of(node, 3, "stride", 1)),
        *map(size_of, weight.meta["val"].shape[2:]),
    ]
    return set(steps) == {1} and set(dims_of(argument_of(node, 4, "padding", 0))) == {0}


def _embedding(axes: Axes, node: fx.Node) -> None:
    out, index = axes.tensors(node)[0], axes.of(operand_of(node, 1))
    unify(axes, out[:-1], index)
    axes.variables.union(out[-1], axes.of(operand_of(node))[1])
    note_mix(axes, node, operand_of(node), [0], "looks it up by index")


PRODUCTS: dict[str, Rule] = {
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "convolution", "max_pool2d", "avg_pool2d"), _convolution
    ),
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    "thresher::adaptive_gate": _gate,
    "thresher::sparse_gated_ffn": _sparse(3),
    "thresher::sparse_linear": _sparse(1),
}
