"""Operators that cut axes or join them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from thresher.compiler.analysis.axes import Axes, Size, hint_of, size_of, tensor_operands
from thresher.compiler.analysis.rules.operands import (
    Rule,
    argument_of,
    dims_of,
    note_mix,
    note_use,
    operand_of,
)

TOGETHER = "reshapes it together with its neighbours"
WHOLE = 2**31  # slice ends at or beyond this mean "to the end"


def _slice(axes: Axes, node: fx.Node) -> None:
    operand = operand_of(node)
    out, source = axes.tensors(node)[0], axes.of(operand)
    dim = dims_of(argument_of(node, 1, "dim", 0))[0] % len(source)
    start, step = argument_of(node, 2, "start", 0) or 0, argument_of(node, 4, "step", 1)
    for axis, variable in enumerate(source):
        if axis != dim:
            axes.variables.union(out[axis], variable)
    whole, part = axes.variables.size(source[dim]), axes.variables.size(out[dim])
    if isinstance(start, int) and isinstance(whole, int) and -whole <= start < 0:
        start += whole
    if whole == part:
        axes.variables.union(out[dim], source[dim])
    elif isinstance(start, int) and start > 0 and step == 1 and whole - part == start:
        axes.variables.union(out[dim], axes.variables.suffix(source[dim], start))
        note_use(axes, node, operand, dim, "tail", start)
    elif start == 0 and step == 1 and isinstance(part, int):
        note_use(axes, node, operand, dim, "head", part)
    else:
        note_mix(axes, node, operand, [dim], "takes a part of it")


def _split(axes: Axes, node: fx.Node) -> None:
    operand = operand_of(node)
    source = axes.of(operand)
    dim = dims_of(argument_of(node, 2, "dim", 0))[0] % len(source)
    sizes = [axes.variables.size(out[dim]) for out in axes.tensors(node)]
    for out in axes.tensors(node):
        for axis, variable in enumerate(source):
            if axis != dim:
                axes.variables.union(out[axis], variable)
    if len(sizes) == 2 and isinstance(sizes[0], int):
        axes.variables.union(
            axes.tensors(node)[1][dim], axes.variables.suffix(source[dim], sizes[0])
        )
        note_use(axes, node, operand, dim, "tail", sizes[0])
    else:
        note_mix(axes, node, operand, [dim], "splits it")


def _cat(axes: Axes, node: fx.Node) -> None:
    parts = [n for n in tensor_operands(node) if n.meta["val"].dim() > 0]
    out = axes.tensors(node)[0]
    dim = dims_of(argument_of(node, 1, "dim", 0))[0] % len(out)
    for operand in parts:
        for axis, variable in enumerate(axes.of(operand)):
            if axis != dim:
                axes.variables.union(out[axis], variable)
    if not parts:
        return
    *heads, last = [axes.of(operand)[dim] for operand in parts]
    prefix = sum(size if isinstance(size := axes.variables.size(v), int) else WHOLE for v in heads)
    if not heads:
        axes.variables.union(out[dim], last)
    elif prefix < WHOLE:
        whole = axes.variables.cat(prefix, last, axes.variables.size(out[dim]))
        axes.variables.union(out[dim], whole)
        for operand in parts[:-1]:
            note_use(axes, node, operand, dim, "part", why="puts something after it")
    else:
        for operand in parts:
            note_mix(axes, node, operand, [dim], "puts something after it")


def _view(axes: Axes, node: fx.Node) -> None:
    """Runs of axes are taken apart into the pieces that both shapes are made of, and merged from them."""
    operand = operand_of(node)
    ins, outs = operand.meta["val"].shape, node.meta["val"].shape
    source, out = axes.of(operand), axes.tensors(node)[0]
    for left, right in _groups(ins, outs):
        sizes = [size_of(ins[i]) for i in left], [size_of(outs[j]) for j in right]
        apart = _pieces(*sizes)
        if apart is None:
            note_mix(axes, node, operand, left, TOGETHER)
            continue
        pieces: list[int] = []
        new = False
        for axis, parts in zip(left, apart[0], strict=True):
            found, known = axes.variables.parts(source[axis], parts)
            pieces += found
            new = new or not known
            if len(parts) > 1:
                note_mix(axes, node, operand, [axis], "splits it into a grid")
        if new and len(left) > 1:
            note_mix(axes, node, operand, left, TOGETHER)
        for axis, size, parts in zip(right, sizes[1], apart[1], strict=True):
            mine, pieces = pieces[: len(parts)], pieces[len(parts) :]
            whole = mine[0] if len(mine) == 1 else axes.variables.product(mine, size)
            axes.variables.union(out[axis], whole)


def _pieces(
    left: Sequence[Size], right: Sequence[Size]
) -> tuple[list[list[Size]], list[list[Size]]] | None:
    """The fewest pieces, from the left, that axes of both runs are products of, by axis; None if there are none."""
    if len(left) == 1 or len(right) == 1:
        (whole, parts) = (left, right) if len(left) == 1 else (right, left)
        one, each = [list(parts)], [[part] for part in parts]
        return (one, each) if whole is left else (each, one)
    apart: tuple[list[list[Size]], list[list[Size]]] = ([[]], [[]])
    rest = [list(left), list(right)]
    while rest[0] and rest[1]:
        a, b = rest[0][0], rest[1][0]
        short = 0 if _quotient(b, a) is not None else 1
        more = _quotient((a, b)[1 - short], (a, b)[short])
        if more is None:
            return None
        for side in (0, 1):
            apart[side][-1].append((a, b)[short])
        rest[1 - short][0] = more
        for side in (0, 1):
            if side == short or more == 1:
                rest[side].pop(0)
                apart[side].append([])
    return [p for p in apart[0] if p], [p for p in apart[1] if p]


def _quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` where that is whole for every value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    ratio = (a / b).cancel()
    if ratio.is_Integer:
        return int(ratio)
    return None if ratio.is_number or ratio.as_numer_denom()[1] != 1 else ratio


def _groups(
    ins: Sequence[int | torch.SymInt], outs: Sequence[int | torch.SymInt]
) -> list[tuple[list[int], list[int]]]:
    """Pair up the smallest runs of axes with equal products; axes of size one are left out."""
    left = [i for i, s in enumerate(ins) if size_of(s) != 1]
    right = [j for j, s in enumerate(outs) if size_of(s) != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        run_l, run_r = [left[i]], [right[j]]
        a, b = hint_of(ins[left[i]]), hint_of(outs[right[j]])
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(left):
                a *= hint_of(ins[left[i]])
                run_l.append(left[i])
                i += 1
            elif j < len(right):
                b *= hint_of(outs[right[j]])
                run_r.append(right[j])
                j += 1
            else:
                break
        groups.append((run_l, run_r))
    return groups


CUT: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _view),
    **dict.fromkeys(("split_with_sizes", "split", "chunk"), _split),
    "slice": _slice,
    "cat": _cat,
}
