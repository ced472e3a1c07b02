"""Operators that move, add or take away whole axes."""

from __future__ import annotations

from torch import fx

from thresher.compiler.analysis.axes import Axes, size_of, tensor_operands
from thresher.compiler.analysis.rules.operands import (
    Rule,
    argument_of,
    dims_of,
    note_mix,
    note_use,
    operand_of,
    unify,
)


def _permute(axes: Axes, node: fx.Node) -> None:
    source = axes.of(operand_of(node))
    unify(axes, axes.tensors(node)[0], [source[d] for d in dims_of(node.args[1])])


def _transpose(axes: Axes, node: fx.Node) -> None:
    source = list(axes.of(operand_of(node)))
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (-2, -1)
    if len(source) >= 2 and isinstance(a, int) and isinstance(b, int):
        source[a], source[b] = source[b], source[a]
    unify(axes, axes.tensors(node)[0], source)


def _unsqueeze(axes: Axes, node: fx.Node) -> None:
    out = list(axes.tensors(node)[0])
    dim = dims_of(node.args[1])[0] % len(out)
    unify(axes, out[:dim] + out[dim + 1 :], axes.of(operand_of(node)))


def _squeeze(axes: Axes, node: fx.Node) -> None:
    shape = operand_of(node).meta["val"].shape
    dims = (
        {d % len(shape) for d in dims_of(node.args[1])}
        if len(node.args) > 1
        else set(range(len(shape)))
    )
    kept = [
        v
        for i, v in enumerate(axes.of(operand_of(node)))
        if i not in dims or size_of(shape[i]) != 1
    ]
    unify(axes, axes.tensors(node)[0], kept)


def _expand(axes: Axes, node: fx.Node) -> None:
    out, source = axes.tensors(node)[0], axes.of(operand_of(node))
    for back, variable in enumerate(reversed(source), 1):
        if size_of(operand_of(node).meta["val"].shape[-back]) != 1:
            axes.variables.union(out[-back], variable)


def _repeat(axes: Axes, node: fx.Node) -> None:
    out, source = axes.tensors(node)[0], axes.of(operand_of(node))
    for back, variable in enumerate(reversed(source), 1):
        if axes.variables.size(out[-back]) == axes.variables.size(variable):
            axes.variables.union(out[-back], variable)
        else:
            note_mix(axes, node, operand_of(node), [-back], "repeats it")


def _select(axes: Axes, node: fx.Node) -> None:
    operand = operand_of(node)
    source = list(axes.of(operand))
    dim, index = dims_of(node.args[1])[0] % len(source), node.args[2]
    if isinstance(index, int) and index >= 0:
        note_use(axes, node, operand, dim, "read", index)
    else:
        note_mix(axes, node, operand, [dim], "reads an entry counted from its end")
    del source[dim]
    unify(axes, axes.tensors(node)[0], source)


def _unbind(axes: Axes, node: fx.Node) -> None:
    operand = operand_of(node)
    source = list(axes.of(operand))
    dim = dims_of(argument_of(node, 1, "dim", 0))[0] % len(source)
    note_mix(axes, node, operand, [dim], "takes it apart")
    del source[dim]
    for out in axes.tensors(node):
        unify(axes, out, source)


def _stack(axes: Axes, node: fx.Node) -> None:
    out = list(axes.tensors(node)[0])
    dim = dims_of(argument_of(node, 1, "dim", 0))[0] % len(out)
    del out[dim]
    for operand in tensor_operands(node):
        unify(axes, out, axes.of(operand))


def getitem(axes: Axes, node: fx.Node) -> None:
    """One of several results."""
    index = node.args[1]
    assert isinstance(index, int)
    tensors = axes.tensors(operand_of(node))
    if index < len(tensors):
        unify(axes, axes.tensors(node)[0], tensors[index])


MOVED: dict[str, Rule] = {
    **dict.fromkeys(("transpose", "t", "numpy_T"), _transpose),
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "select": _select,
    "unbind": _unbind,
    "stack": _stack,
}
