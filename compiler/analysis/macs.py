"""Multiply-accumulates of one call of an operator, by the shapes of what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch

from thresher.compiler.analysis.attention import SDPA

aten = torch.ops.aten
Shape = Sequence[int]
Rule = Callable[[Sequence[Shape], Shape], int]  # of operands, a whole number as [n], and result


def rule_of(target: object, share: float = 1.0) -> Rule | None:
    """The rule of an operator, None where nothing is multiplied.

    ``share`` is the part of the work that is expected where it depends on data.
    """
    schema = getattr(target, "_schema", None)
    name = schema.name if schema is not None else ""
    if name in _BY_DATA:
        return partial(_BY_DATA[name], share=share)
    return _MACS.get(target) or _OURS.get(name)


def _linear(args: Sequence[Shape], out: Shape) -> int:
    return prod(out) * args[1][-1]


def _matmul(args: Sequence[Shape], out: Shape) -> int:
    return prod(out) * args[0][-1]


def _addmm(args: Sequence[Shape], out: Shape) -> int:
    return prod(out) * args[1][-1]


def _convolution(args: Sequence[Shape], out: Shape) -> int:
    transposed = len(args) > 6 and args[6] == [True]
    return (_transposed if transposed else _every_place)(args, out)


def _every_place(args: Sequence[Shape], out: Shape) -> int:
    """A kernel for every result."""
    return prod(out) * prod(args[1][1:])


def _transposed(args: Sequence[Shape], out: Shape) -> int:
    """A kernel for every input; what it adds beyond the border is counted."""
    return prod(args[0]) * prod(args[1][1:])


def _attention(args: Sequence[Shape], out: Shape) -> int:
    queries, keys = args[0], args[1]
    return prod(out[:-1]) * keys[-2] * (queries[-1] + out[-1])


def _bipartite_merge(args: Sequence[Shape], out: Shape) -> int:
    """Similarity of every source to every destination, plus the merge of r rows."""
    (batch, tokens, width), dim = args[0], args[2][-1]
    removed = tokens - out[1]
    return batch * ((tokens // 2) ** 2 * dim + removed * removed * width)


def _gate(args: Sequence[Shape], out: Shape) -> int:
    return prod(out) * prod(args[1])


def _adaptive(args: Sequence[Shape], out: Shape, share: float) -> int:
    """The share is that of the learners that run, whose matrices are the operands of rank 3."""
    learners = sum(prod(shape) for shape in args[2:] if len(shape) == 3)
    return round(share * prod(args[0][:-1]) * learners)


def _class_attention(args: Sequence[Shape], out: Shape) -> int:
    return prod(args[1])


def _prune_merge(args: Sequence[Shape], out: Shape) -> int:
    """Similarity of every joining token to every one that stays, plus the merge of their rows."""
    (batch, _, width), (pruned,) = args[0], args[3]
    joining = pruned - out[1]
    return batch * joining * (out[1] + joining) * width


def _keep_tokens(args: Sequence[Shape], out: Shape) -> int:
    return prod(args[0]) - prod(out)


def _sparse_linear(args: Sequence[Shape], out: Shape, share: float) -> int:
    """The share is that of the inputs which few tokens need; many need all."""
    tokens, (most,) = prod(out[:-1]), args[3]
    return round((share if tokens <= most else 1) * tokens * prod(args[1]))


def _sparse_gated_ffn(args: Sequence[Shape], out: Shape, share: float) -> int:
    """The gate is dense; the share is that of the neurons which few tokens need."""
    tokens, (most,) = prod(out[:-1]), args[6]
    gate, up, down = map(prod, args[1:4])
    return tokens * gate + round((share if tokens <= most else 1) * tokens * (up + down))


def _select_diverse(args: Sequence[Shape], out: Shape) -> int:
    """Similarity of all pairs; the prefix, which is left out, is counted."""
    batch, tokens, width = args[0]
    return batch * tokens * tokens * width


def _soft_merge(args: Sequence[Shape], out: Shape) -> int:
    """Every mean over all tokens; the prefix, which is left out, is counted."""
    return prod(args[2]) * args[1][-1]


def _token_energy(args: Sequence[Shape], out: Shape) -> int:
    """Cosine of every token to every one behind the prefix."""
    (*_, tokens, dim), (protected,) = args[0], args[3]
    return prod(out) * (tokens - protected) * dim


def _redundant_merge(args: Sequence[Shape], out: Shape) -> int:
    """Similarity of every source to every target, plus the merge of their rows."""
    (batch, tokens, width), dim = args[0], args[2][-1]
    removed = tokens - out[1]
    return batch * removed * removed * (dim + width)


_MACS: dict[object, Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.conv1d.default: _every_place,
    aten.conv2d.default: _every_place,
    aten.conv3d.default: _every_place,
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
    aten.convolution.default: _convolution,
    SDPA: _attention,
}
_OURS = {
    "thresher::adaptive_gate": _gate,
    "thresher::bipartite_merge": _bipartite_merge,
    "thresher::class_attention": _class_attention,
    "thresher::keep_tokens": _keep_tokens,
    "thresher::prune_merge": _prune_merge,
    "thresher::redundant_merge": _redundant_merge,
    "thresher::select_diverse": _select_diverse,
    "thresher::soft_merge": _soft_merge,
    "thresher::split_merge": _bipartite_merge,
    "thresher::token_energy": _token_energy,
}
_BY_DATA: dict[str, Callable[..., int]] = {
    "thresher::adaptive_gated_mlp": _adaptive,
    "thresher::adaptive_mlp": _adaptive,
    "thresher::expert_mlp": _adaptive,
    "thresher::sparse_gated_ffn": _sparse_gated_ffn,
    "thresher::sparse_linear": _sparse_linear,
}
