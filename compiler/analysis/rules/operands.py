"""How rules read a node's operands, and what they may state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import fx

from thresher.compiler.analysis.axes import Axes, Use, tensor_operands

Rule: TypeAlias = Callable[[Axes, fx.Node], None]


def operator_name(node: fx.Node) -> str:
    """``"linear"`` for aten's, ``"thresher::keep_tokens"`` for ours."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else str(node.target)


def note_use(
    axes: Axes, node: fx.Node, operand: fx.Node, axis: int, kind: str, index: int = 0, why: str = ""
) -> None:
    """One :class:`Use` of an axis."""
    axes.uses.append(Use(node, operand, axis, kind, index, why))


def note_mix(axes: Axes, node: fx.Node, operand: fx.Node, dims: Sequence[int], why: str) -> None:
    """These axes are mixed; a refusal ends with ``why``."""
    rank = len(axes.of(operand))
    for axis in dims:
        note_use(axes, node, operand, axis % rank, "mix", why=why)


def unify(axes: Axes, a: Sequence[int], b: Sequence[int]) -> None:
    """Variables are the same, pair by pair."""
    for x, y in zip(a, b, strict=True):
        axes.variables.union(x, y)


def argument_of(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument, given by place or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def operand_of(node: fx.Node, position: int = 0) -> fx.Node:
    """An argument that is a tensor."""
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand


def dims_of(value: object) -> list[int]:
    """A ``dim`` argument as a list; empty where none is given."""
    if isinstance(value, int):
        return [value]
    return [d for d in value if isinstance(d, int)] if isinstance(value, (list, tuple)) else []


def unknown(axes: Axes, node: fx.Node) -> None:
    """The rule of operators without one."""
    for operand in tensor_operands(node):
        note_mix(
            axes,
            node,
            operand,
            range(len(axes.of(operand))),
            f"is {operator_name(node)}, which thresher does not know",
        )
