"""Steps that passes insert: tokens are scored, leave, and are looked up or put back by position."""

from __future__ import annotations

from torch import fx

from thresher.compiler.analysis.axes import Axes, tensor_operands
from thresher.compiler.analysis.rules.operands import Rule, note_mix, operand_of, unify


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


_REDUCING = (
    "thresher::bipartite_merge", "thresher::keep_tokens", "thresher::prune_merge",
    "thresher::select_diverse", "thresher::redundant_merge", "thresher::soft_merge",
    "thresher::split_merge",
)  # fmt: skip

STEPS: dict[str, Rule] = {
    **dict.fromkeys(_REDUCING, _reduced),
    **dict.fromkeys(("thresher::class_attention", "thresher::token_energy"), _scored),
    "thresher::gather_tokens": _gathered,
    "thresher::restore_tokens": _restored,
}
