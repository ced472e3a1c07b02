"""What each operator says about the axes of its operands and results (see :mod:`.axes`).

One small function per kind of operator.  An operator without a rule mixes every axis it is given:
nothing is known about it, so nothing may change under it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from thresher.compiler.analysis.axes import Axes, Use, hint_of, size_of, tensor_operands

Rule = Callable[[Axes, fx.Node], None]
WHOLE = 2**31  # slice ends at or beyond this mean "to the end"


def apply_rule(axes: Axes, node: fx.Node) -> None:
    """State what ``node`` implies; unions and uses go into ``axes``."""
    if node.op == "output":
        for operand in node.all_input_nodes:
            if axes.has(operand):
                for axis in range(len(axes.of(operand))):
                    _use(axes, node, operand, axis, "output")
        return
    if node.op != "call_function" or not axes.tensors(node):
        return
    if node.target is operator.getitem:
        _getitem(axes, node)
        return
    rule = RULES.get(_name(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    (rule or _unknown)(axes, node)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else str(node.target)


def _use(
    axes: Axes, node: fx.Node, operand: fx.Node, axis: int, kind: str, index: int = 0, why: str = ""
) -> None:
    axes.uses.append(Use(node, operand, axis, kind, index, why))


def _mix(axes: Axes, node: fx.Node, operand: fx.Node, dims: Sequence[int], why: str) -> None:
    rank = len(axes.of(operand))
    for axis in dims:
        _use(axes, node, operand, axis % rank, "mix", why=why)


def _equal(axes: Axes, a: Sequence[int], b: Sequence[int]) -> None:
    for x, y in zip(a, b, strict=True):
        axes.variables.union(x, y)


def _argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def _operand(node: fx.Node, position: int = 0) -> fx.Node:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand


def _dims(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [d for d in value if isinstance(d, int)] if isinstance(value, (list, tuple)) else []


# --- same shape -------------------------------------------------------------------------------


def _pointwise(axes: Axes, node: fx.Node) -> None:
    for out in axes.tensors(node):
        for operand in tensor_operands(node):
            shape = operand.meta["val"].shape
            for back, (size, variable) in enumerate(
                zip(reversed(shape), reversed(axes.of(operand)), strict=True), 1
            ):
                if back <= len(out) and size_of(size) != 1:
                    axes.variables.union(out[-back], variable)


def _same(axes: Axes, node: fx.Node) -> None:
    _equal(axes, axes.tensors(node)[0], axes.of(_operand(node)))


def _adaptive(axes: Axes, node: fx.Node) -> None:
    """Tokens one by one, each with its own count."""
    _same(axes, node)
    _equal(axes, axes.of(_operand(node))[:2], axes.of(_operand(node, 1)))


def _over(dim_position: int, why: str) -> Rule:
    def rule(axes: Axes, node: fx.Node) -> None:
        _same(axes, node)
        _mix(axes, node, _operand(node), _dims(_argument(node, dim_position, "dim", -1)), why)

    return rule


def _trailing_norm(axes: Axes, node: fx.Node) -> None:
    _same(axes, node)
    shape = _argument(node, 1, "normalized_shape")
    assert isinstance(shape, (list, tuple))
    _mix(axes, node, _operand(node), range(-len(shape), 0), "normalises over it")


def _channel_norm(axes: Axes, node: fx.Node) -> None:
    operand = _operand(node)
    _equal(axes, axes.tensors(node)[0], axes.of(operand))
    _mix(axes, node, operand, range(2, len(axes.of(operand))), "normalises over it")


# --- moved axes -------------------------------------------------------------------------------


def _permute(axes: Axes, node: fx.Node) -> None:
    source = axes.of(_operand(node))
    _equal(axes, axes.tensors(node)[0], [source[d] for d in _dims(node.args[1])])


def _transpose(axes: Axes, node: fx.Node) -> None:
    source = list(axes.of(_operand(node)))
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (-2, -1)
    if len(source) >= 2 and isinstance(a, int) and isinstance(b, int):
        source[a], source[b] = source[b], source[a]
    _equal(axes, axes.tensors(node)[0], source)


def _unsqueeze(axes: Axes, node: fx.Node) -> None:
    out = list(axes.tensors(node)[0])
    dim = _dims(node.args[1])[0] % len(out)
    _equal(axes, out[:dim] + out[dim + 1 :], axes.of(_operand(node)))


def _squeeze(axes: Axes, node: fx.Node) -> None:
    shape = _operand(node).meta["val"].shape
    dims = (
        {d % len(shape) for d in _dims(node.args[1])}
        if len(node.args) > 1
        else set(range(len(shape)))
    )
    kept = [
        v for i, v in enumerate(axes.of(_operand(node))) if i not in dims or size_of(shape[i]) != 1
    ]
    _equal(axes, axes.tensors(node)[0], kept)


def _expand(axes: Axes, node: fx.Node) -> None:
    out, source = axes.tensors(node)[0], axes.of(_operand(node))
    for back, variable in enumerate(reversed(source), 1):
        if size_of(_operand(node).meta["val"].shape[-back]) != 1:
            axes.variables.union(out[-back], variable)


def _repeat(axes: Axes, node: fx.Node) -> None:
    out, source = axes.tensors(node)[0], axes.of(_operand(node))
    for back, variable in enumerate(reversed(source), 1):
        if axes.variables.size(out[-back]) == axes.variables.size(variable):
            axes.variables.union(out[-back], variable)
        else:
            _mix(axes, node, _operand(node), [-back], "repeats it")


def _select(axes: Axes, node: fx.Node) -> None:
    operand = _operand(node)
    source = list(axes.of(operand))
    dim, index = _dims(node.args[1])[0] % len(source), node.args[2]
    if isinstance(index, int) and index >= 0:
        _use(axes, node, operand, dim, "read", index)
    else:
        _mix(axes, node, operand, [dim], "reads an entry counted from its end")
    del source[dim]
    _equal(axes, axes.tensors(node)[0], source)


def _unbind(axes: Axes, node: fx.Node) -> None:
    operand = _operand(node)
    source = list(axes.of(operand))
    dim = _dims(_argument(node, 1, "dim", 0))[0] % len(source)
    _mix(axes, node, operand, [dim], "takes it apart")
    del source[dim]
    for out in axes.tensors(node):
        _equal(axes, out, source)


def _stack(axes: Axes, node: fx.Node) -> None:
    out = list(axes.tensors(node)[0])
    dim = _dims(_argument(node, 1, "dim", 0))[0] % len(out)
    del out[dim]
    for operand in tensor_operands(node):
        _equal(axes, out, axes.of(operand))


def _getitem(axes: Axes, node: fx.Node) -> None:
    index = node.args[1]
    assert isinstance(index, int)
    tensors = axes.tensors(_operand(node))
    if index < len(tensors):
        _equal(axes, axes.tensors(node)[0], tensors[index])


# --- cut and joined axes ----------------------------------------------------------------------


def _slice(axes: Axes, node: fx.Node) -> None:
    operand = _operand(node)
    out, source = axes.tensors(node)[0], axes.of(operand)
    dim = _dims(_argument(node, 1, "dim", 0))[0] % len(source)
    start, step = _argument(node, 2, "start", 0) or 0, _argument(node, 4, "step", 1)
    for axis, variable in enumerate(source):
        if axis != dim:
            axes.variables.union(out[axis], variable)
    whole, part = axes.variables.size(source[dim]), axes.variables.size(out[dim])
    if whole == part:
        axes.variables.union(out[dim], source[dim])
    elif isinstance(start, int) and start > 0 and step == 1 and whole - part == start:
        axes.variables.union(out[dim], axes.variables.suffix(source[dim], start))
        _use(axes, node, operand, dim, "tail", start)
    elif start == 0 and step == 1 and isinstance(part, int):
        _use(axes, node, operand, dim, "head", part)
    else:
        _mix(axes, node, operand, [dim], "takes a part of it")


def _split(axes: Axes, node: fx.Node) -> None:
    operand = _operand(node)
    source = axes.of(operand)
    dim = _dims(_argument(node, 2, "dim", 0))[0] % len(source)
    sizes = [axes.variables.size(out[dim]) for out in axes.tensors(node)]
    for out in axes.tensors(node):
        for axis, variable in enumerate(source):
            if axis != dim:
                axes.variables.union(out[axis], variable)
    if len(sizes) == 2 and isinstance(sizes[0], int):
        axes.variables.union(
            axes.tensors(node)[1][dim], axes.variables.suffix(source[dim], sizes[0])
        )
        _use(axes, node, operand, dim, "tail", sizes[0])
    else:
        _mix(axes, node, operand, [dim], "splits it")


def _cat(axes: Axes, node: fx.Node) -> None:
    parts = [n for n in tensor_operands(node) if n.meta["val"].dim() > 0]
    out = axes.tensors(node)[0]
    dim = _dims(_argument(node, 1, "dim", 0))[0] % len(out)
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
            _use(axes, node, operand, dim, "part", why="puts something after it")
    else:
        for operand in parts:
            _mix(axes, node, operand, [dim], "puts something after it")


def _view(axes: Axes, node: fx.Node) -> None:
    operand = _operand(node)
    ins, outs = operand.meta["val"].shape, node.meta["val"].shape
    source, out = axes.of(operand), axes.tensors(node)[0]
    for left, right in _groups(ins, outs):
        if len(left) == 1 and len(right) == 1:
            axes.variables.union(source[left[0]], out[right[0]])
        elif len(right) == 1:
            size = size_of(outs[right[0]])
            axes.variables.union(
                out[right[0]], axes.variables.product([source[i] for i in left], size)
            )
        elif len(left) == 1:
            _split_axis(axes, node, operand, left[0], [out[j] for j in right])
        else:
            _mix(axes, node, operand, left, "reshapes it together with its neighbours")


def _split_axis(axes: Axes, node: fx.Node, operand: fx.Node, axis: int, out: list[int]) -> None:
    whole = axes.of(operand)[axis]
    known = axes.variables.factors(whole)
    sizes = [axes.variables.size(v) for v in out]
    if known is not None and [axes.variables.size(v) for v in known] == sizes:
        _equal(axes, out, known)
    else:
        axes.variables.declare_grid(out, whole)
        _mix(axes, node, operand, [axis], "splits it into a grid")


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


# --- contractions -----------------------------------------------------------------------------


def _linear(axes: Axes, node: fx.Node) -> None:
    operand, weight = _operand(node), _operand(node, 1)
    out, source = axes.tensors(node)[0], axes.of(operand)
    _equal(axes, out[:-1], source[:-1])
    axes.variables.union(out[-1], axes.of(weight)[0])
    _mix(axes, node, operand, [-1], "multiplies it by a weight")


def _sparse(last: int) -> Rule:
    """As linears, whose ``last`` weight is ``[.., outputs]``; how many tokens there are in all decides."""

    def rule(axes: Axes, node: fx.Node) -> None:
        operand, out = _operand(node), axes.tensors(node)[0]
        _equal(axes, out[:-1], axes.of(operand)[:-1])
        axes.variables.union(out[-1], axes.of(_operand(node, last))[1])
        _mix(axes, node, operand, [-1], "multiplies it by a weight")

    return rule


def _matmul(axes: Axes, node: fx.Node) -> None:
    a, b = _operand(node), _operand(node, 1)
    left, right, out = axes.of(a), axes.of(b), axes.tensors(node)[0]
    if len(left) < 2 or len(right) < 2:
        _unknown(axes, node)
        return
    axes.variables.union(left[-1], right[-2])
    axes.variables.union(out[-2], left[-2])
    axes.variables.union(out[-1], right[-1])
    for operand, source in ((a, left), (b, right)):
        for back in range(3, len(source) + 1):
            if size_of(operand.meta["val"].shape[-back]) != 1:
                axes.variables.union(out[-back], source[-back])
    _mix(axes, node, a, [-1], "sums over it in a matrix product")
    _mix(axes, node, b, [-2], "sums over it in a matrix product")


def _attention(axes: Axes, node: fx.Node) -> None:
    q, k, v = (_operand(node, i) for i in range(3))
    out = axes.tensors(node)[0]
    vq, vk, vv = axes.of(q), axes.of(k), axes.of(v)
    axes.variables.union(out[-2], vq[-2])
    axes.variables.union(out[-1], vv[-1])
    axes.variables.union(vk[-2], vv[-2])
    axes.variables.union(vq[-1], vk[-1])
    for variables in (vq, vk, vv):
        for i in range(len(variables) - 2):
            axes.variables.union(out[i], variables[i])
    mask = _argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        full = [*out[:-2], vq[-2], vk[-2]]
        shape = mask.meta["val"].shape
        for back, variable in enumerate(reversed(axes.of(mask)), 1):
            if size_of(shape[-back]) != 1:
                axes.variables.union(full[-back], variable)
    _use(axes, node, q, len(vq) - 2, "query")
    _use(axes, node, k, len(vk) - 2, "key")
    if _argument(node, 5, "is_causal", False):
        _mix(axes, node, q, [-2], "is causal: a token's order decides what it sees")


def _convolution(axes: Axes, node: fx.Node) -> None:
    operand = _operand(node)
    out, source = axes.tensors(node)[0], axes.of(operand)
    if len(out) == len(source):
        axes.variables.union(out[0], source[0])
    _mix(axes, node, operand, range(1, len(source)), "is a convolution over it")


def _embedding(axes: Axes, node: fx.Node) -> None:
    out, index = axes.tensors(node)[0], axes.of(_operand(node, 1))
    _equal(axes, out[:-1], index)
    axes.variables.union(out[-1], axes.of(_operand(node))[1])
    _mix(axes, node, _operand(node), [0], "looks it up by index")


# --- reductions -------------------------------------------------------------------------------


def _reduce(kind: str, why: str) -> Rule:
    def rule(axes: Axes, node: fx.Node) -> None:
        operand = _operand(node)
        source = axes.of(operand)
        given = _dims(_argument(node, 1, "dim"))
        dims = {d % len(source) for d in given} if given else set(range(len(source)))
        keep = bool(_argument(node, 2, "keepdim", False))
        for axis in dims:
            _use(axes, node, operand, axis, kind, why=why)
        rest = [v for axis, v in enumerate(source) if axis not in dims]
        for out in axes.tensors(node):
            left = [v for axis, v in enumerate(out) if not keep or axis not in dims]
            if len(left) == len(rest):
                _equal(axes, left, rest)

    return rule


def _index(axes: Axes, node: fx.Node) -> None:
    """``x[i, j, ...]``: the result's leading axes follow the index tensors, broadcast together."""
    operand, indices = _operand(node), node.args[1]
    assert isinstance(indices, (list, tuple))
    source, out = axes.of(operand), axes.tensors(node)[0]
    used = [i for i, index in enumerate(indices) if isinstance(index, fx.Node)]
    _mix(axes, node, operand, used, "looks it up by index")
    if used != list(range(len(used))):
        return
    tensors = [index for index in indices if isinstance(index, fx.Node)]
    rank = max(t.meta["val"].dim() for t in tensors)
    for tensor in tensors:
        for back, variable in enumerate(reversed(axes.of(tensor)), 1):
            if size_of(tensor.meta["val"].shape[-back]) != 1:
                axes.variables.union(out[rank - back], variable)
    _equal(axes, out[rank:], source[len(used) :])


def _fresh(axes: Axes, node: fx.Node) -> None:
    """Creates a tensor from sizes: nothing is known until it is used."""


def _unknown(axes: Axes, node: fx.Node) -> None:
    for operand in tensor_operands(node):
        _mix(
            axes,
            node,
            operand,
            range(len(axes.of(operand))),
            f"is {_name(node)}, which thresher does not know",
        )


def _reduced(axes: Axes, node: fx.Node) -> None:
    """A reduction step of ours: the axis is a new one, and a second reduction would need its own sites."""
    for operand in tensor_operands(node):
        _mix(axes, node, operand, range(1, len(axes.of(operand))), "already reduces it")


_SAME = (
    "clone", "contiguous", "detach", "alias", "dropout", "to", "_to_copy", "gelu", "silu", "relu", "type_as",
    "masked_fill", "where", "lift_fresh_copy", "native_dropout", "zeros_like", "ones_like", "full_like",
    "empty_like", "bernoulli", "pow", "_assert_tensor_metadata", "copy",
)  # fmt: skip
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
_REDUCED = ("sum", "amax", "amin", "var", "std", "prod", "any", "all", "argmax", "max", "min")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, _pointwise),
    **dict.fromkeys(_CREATED, _fresh),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _over(1, "takes a softmax over it")),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), _over(1, "accumulates along it")),
    **dict.fromkeys(("flip", "roll"), _over(2, "reorders it")),
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm"), _trailing_norm),
    **dict.fromkeys(("group_norm", "instance_norm"), _channel_norm),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _view),
    **dict.fromkeys(("transpose", "t", "numpy_T"), _transpose),
    **dict.fromkeys(("split_with_sizes", "split", "chunk"), _split),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "max_pool2d", "avg_pool2d"), _convolution),
    **dict.fromkeys(_REDUCED, _reduce("mix", "reduces over it")),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _same),
    "mean": _reduce("mean", "averages it"),
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "select": _select,
    "unbind": _unbind,
    "stack": _stack,
    "slice": _slice,
    "cat": _cat,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "thresher::adaptive_mlp": _adaptive,
    "thresher::adaptive_gated_mlp": _adaptive,
    "thresher::sparse_gated_ffn": _sparse(3),
    "thresher::sparse_linear": _sparse(1),
    "embedding": _embedding,
    "index": _index,
    **dict.fromkeys(
        (
            "thresher::bipartite_merge", "thresher::keep_tokens", "thresher::prune_merge",
            "thresher::select_diverse", "thresher::redundant_merge", "thresher::restore_tokens",
            "thresher::soft_merge",
        ),
        _reduced,
    ),
}  # fmt: skip
