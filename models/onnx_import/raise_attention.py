"""Attention that exporters take to pieces, put together again.

From ``MatMul(softmax(scores), v)`` we walk up: past casts and the guard against rows without any
key, to the softmax; from there past masks and scales to the product of query and key.  Masks are
added with the scale that they met on the way; scales on query, key and scores multiply up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from thresher.models.onnx_import.masks import lean, sum_of_masks
from thresher.models.onnx_import.match import Matcher
from thresher.models.onnx_import.ops_attention import ATTENTION
from thresher.models.onnx_import.values import same

LOOKED_FOR = "MatMul, optional scale and mask, Softmax over the last axis, MatMul; or Attention"


@dataclass
class _Scores:
    """``scale * tensors * (q @ kt) + masks``; ``tensors`` are the factors that are not numbers."""

    product: ir.Node
    scale: float = 1.0
    tensors: list[ir.Value] = field(default_factory=list)
    masks: list[ir.Value] = field(default_factory=list)


def raise_attention(m: Matcher) -> int:
    """Rewrite every attention found and return how many there are, ``Attention`` nodes included."""
    count = 0
    for node in list(m.graph):
        if node.op_type == "MatMul" and node.domain == "":
            count += _attention(m, node)
        elif node.op_type == "Attention" and node.domain == "":
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            if mask is not None:
                node.replace_input_with(3, lean(m, node, mask))
            count += 1
    return count


def _attention(m: Matcher, node: ir.Node) -> bool:
    """Replace one attention that ends in ``node``, if there is one."""
    softmax = _softmax(m, node.inputs[0])
    value = node.inputs[1]
    if softmax is None or value is None or m.constant(value) is not None:
        return False
    scores = _scores(m, softmax, softmax.inputs[0], 12)
    if scores is None:
        return False
    query, key = scores.product.inputs[0], scores.product.inputs[1]
    if query is None or key is None or len(m.shape(query)) < 3:
        return False
    query, share = _unscaled(m, query)
    scores.scale *= share
    key, share = _key(m, node, key)
    scores.scale *= share
    split = _split_heads(m, [query, key, value, *scores.masks])
    if split is None and len(m.shape(softmax.outputs[0])) != len(m.shape(query)):
        return False
    query, key, value, *masks = split or [query, key, value, *scores.masks]
    for factor in scores.tensors:
        query = m.emit(node, "Mul", [query, factor], m.shape(query))
    inputs, mask = [query, key, value], sum_of_masks(m, node, masks)
    if mask is not None:
        inputs.append(mask)
    domain, op = ATTENTION.split("::")
    shape = (*m.shape(query)[:-1], m.shape(value)[-1])
    new = m.emit(node, op, inputs, shape, {"scale": scores.scale}, domain)
    if split is not None:
        new = _join_heads(m, node, new)
    m.replace(node.outputs[0], new)
    return True


def _split_heads(m: Matcher, values: list[ir.Value]) -> list[ir.Value] | None:
    """``[B, H, ...]`` for values ``[B * H, ...]`` that are reshaped from it; None if one is not."""
    found = []
    for position, value in enumerate(values):
        if len(m.shape(value)) != 3:
            if position < 3:
                return None
            found.append(value)
            continue
        reshape = m.producer(value, "Reshape")
        whole = reshape.inputs[0] if reshape else None
        if whole is None or not _merges_heads(m.shape(whole), m.shape(value)):
            return None
        found.append(whole)
    return found


def _merges_heads(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether ``[B, H, n, m]`` becomes ``[B * H, n, m]``."""
    return len(before) == 4 and len(after) == 3 and all(map(same, before[2:], after[1:]))


def _join_heads(m: Matcher, node: ir.Node, new: ir.Value) -> ir.Value:
    """``[B * H, N, d]`` for the old users; those that only split it again take ``new`` itself."""
    shape, old = m.shape(new), node.outputs[0]
    for use in list(old.uses()):
        result = use.node.outputs[0]
        again = m.shape(result)
        if use.node.op_type == "Reshape" and len(again) == 4 and all(map(same, shape, again)):
            m.replace(result, new)
    minus = m.literal(torch.tensor([-1]), "heads_joined")
    rest = m.emit(node, "Shape", [new], (2,), {"start": 2})
    target = m.emit(node, "Concat", [minus, rest], (3,), {"axis": 0})
    return m.emit(node, "Reshape", [new, target], m.shape(old))


def _softmax(m: Matcher, value: ir.Value | None) -> ir.Node | None:
    """The softmax over the last axis that ``value`` is, give or take casts and the NaN guard."""
    while (node := m.producer(value)) is not None and value is not None:
        if node.op_type == "Softmax":
            axis = m.attribute(node, "axis", -1 if _opset(m) >= 13 else 1)
            return node if axis in (-1, len(m.shape(value)) - 1) else None
        if node.op_type in ("Cast", "Dropout", "Identity"):
            value = node.inputs[0]
        elif node.op_type == "Reshape" and node.inputs[0] is not None:
            if not _merges_heads(m.shape(node.inputs[0]), m.shape(value)):
                return None
            value = node.inputs[0]
        elif node.op_type == "Where":  # Where(IsNaN(p), 0, p)
            guard = m.producer(node.inputs[0], "IsNaN")
            if guard is None or guard.inputs[0] is not node.inputs[2]:
                return None
            value = node.inputs[2]
        else:
            return None
    return None


def _opset(m: Matcher) -> int:
    return m.graph.opset_imports.get("", 1)


def _scores(m: Matcher, at: ir.Node, value: ir.Value | None, depth: int) -> _Scores | None:
    """Read ``value`` as scores.  New nodes go in front of ``at``."""
    node = m.producer(value)
    if node is None or value is None or depth == 0:
        return None
    match node.op_type:
        case "MatMul":
            constant = any(m.constant(v) is not None for v in node.inputs)
            return None if constant else _Scores(node)
        case "Cast" | "Identity":
            return _scores(m, at, node.inputs[0], depth - 1)
        case "Reshape" if node.inputs[0] is not None:
            splits = _merges_heads(m.shape(value), m.shape(node.inputs[0]))
            return _scores(m, at, node.inputs[0], depth - 1) if splits else None
        case "Mul" | "Div":
            return _scaled(m, at, node, depth)
        case "Add":
            for one, mask in m.operands(node):
                found = _scores(m, at, one, depth - 1)
                if found is not None:
                    found.masks.append(mask)
                    return found
        case "Where":
            return _filled(m, at, node, depth)
    return None


def _scaled(m: Matcher, at: ir.Node, node: ir.Node, depth: int) -> _Scores | None:
    for one, factor in m.operands(node)[: 2 if node.op_type == "Mul" else 1]:
        found = _scores(m, at, one, depth - 1)
        if found is None:
            continue
        number = m.scalar(factor)
        if number is not None:
            found.scale *= number if node.op_type == "Mul" else 1.0 / number
        else:
            shape = m.shape(factor)
            if node.op_type == "Div" or not shape or not same(shape[-1], 1):
                return None  # a factor per key cannot move to the query
            found.tensors.append(factor)
        found.masks = [m.emit(at, node.op_type, [k, factor], m.shape(k)) for k in found.masks]
        return found
    return None


def _filled(m: Matcher, at: ir.Node, node: ir.Node, depth: int) -> _Scores | None:
    """``Where(keep, scores, very negative)`` or the other way round, as an additive mask."""
    keep, yes, no = node.inputs
    for one, fill, first in ((yes, no, False), (no, yes, True)):
        number = m.constant(fill)
        if number is None or number.numel() != 1 or number.item() > -1e3:
            continue
        found = _scores(m, at, one, depth - 1)
        if found is None:
            continue
        zero = m.literal(torch.zeros_like(number), "attention_kept")
        options = [keep, fill, zero] if first else [keep, zero, fill]
        shape = m.shape(keep) if keep is not None else ()
        found.masks.append(m.emit(at, "Where", options, shape))
        return found
    return None


def _unscaled(m: Matcher, value: ir.Value) -> tuple[ir.Value, float]:
    """Peel multiplications by a number."""
    node = m.producer(value, "Mul", "Div")
    if node is not None:
        for one, factor in m.operands(node)[: 2 if node.op_type == "Mul" else 1]:
            number = m.scalar(factor)
            if number is not None:
                inner, share = _unscaled(m, one)
                return inner, share * (number if node.op_type == "Mul" else 1.0 / number)
    return value, 1.0


def _key(m: Matcher, at: ir.Node, value: ir.Value) -> tuple[ir.Value, float]:
    """The key ``[..., N, d]`` of a product's right operand ``[..., d, N]``, and its scale."""
    value, share = _unscaled(m, value)
    shape = m.shape(value)
    swapped = (*shape[:-2], shape[-1], shape[-2])
    node = m.producer(value, "Transpose")
    perm = list(m.attribute(node, "perm") or []) if node is not None else []
    plain = _through_flat(m, value)
    if plain is not None:
        key = plain
    elif node is not None and node.inputs[0] is not None and perm:
        perm[-2:] = perm[:-3:-1]
        key = node.inputs[0]
        if perm != sorted(perm):
            key = m.emit(at, "Transpose", [key], swapped, {"perm": perm})
    else:
        axes = list(range(len(shape)))
        axes[-2:] = axes[:-3:-1]
        key = m.emit(at, "Transpose", [value], swapped, {"perm": axes})
    key, again = _unscaled(m, key)
    return key, share * again


def _through_flat(m: Matcher, value: ir.Value) -> ir.Value | None:
    """``Reshape(Transpose(Reshape(k), 0 2 1))`` that only swaps the last two axes: that k."""
    outer = m.producer(value, "Reshape")
    swap = m.producer(outer.inputs[0], "Transpose") if outer else None
    inner = m.producer(swap.inputs[0], "Reshape") if swap else None
    key = inner.inputs[0] if inner else None
    if swap is None or inner is None or key is None or list(m.attribute(swap, "perm")) != [0, 2, 1]:
        return None
    before, flat, after = m.shape(key), m.shape(inner.outputs[0]), m.shape(value)
    if len(before) != len(after) or len(flat) != 3:
        return None
    wanted = (*before[:-2], before[-1], before[-2])
    whole = all(same(a, b) for a, b in zip(wanted, after, strict=True))
    kept = same(flat[1], before[-2]) and same(flat[2], before[-1])
    return key if whole and kept else None
