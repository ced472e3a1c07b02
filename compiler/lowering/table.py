"""How the exporter writes thresher's operators: one node each, in the domain ``thresher``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import values
from onnxscript.onnx_opset import opset20 as op

from thresher.compiler.lowering.prepare import HIDDEN
from thresher.kernels.registry import DOMAIN, OPERATORS, VERSION
from thresher.kernels.sparse_gated_ffn.function import BF16_BY_ACTIVATION, BY_ACTIVATION


@cache
def _operator(name: str) -> Callable[..., Any]:
    """An onnxscript operator with a schema, so that the exporter keeps it as one node."""
    made = values.Op(values.Opset(DOMAIN, VERSION), name, OPERATORS[name].schema())
    return partial(made, **OPERATORS[name].plugin)


def _count(number: Any) -> Any:
    """As a vector of one, which TensorRT's plugins want."""
    one: Any = op.Constant(value_ints=[1])
    return op.Reshape(number, one)


def _bipartite_merge(
    x: Any, size: Any, metric: Any, keep: Any, protected: int, by_index: bool
) -> Any:
    merge = _operator("BipartiteMerge" if by_index else "RankedBipartiteMerge")
    y, out_size, kept, slot = merge(x, size, metric, _count(keep), protected=protected)
    return y, out_size, slot, kept


def _class_attention(q: Any, k: Any, bias: Any, scale: float, row: int) -> Any:
    """The operator takes the one row of the bias that it needs, added to the logits."""
    if bias is None:
        return _operator("ClassAttention")(q, k, op.Constant(value_float=0.0), scale=scale, row=row)
    marks, rows = bias.dtype == ir.DataType.BOOL, bias.shape[-2]
    if rows != 1:
        ends: list[Any] = [op.Constant(value_ints=[at]) for at in (row, row + 1, -2)]
        bias = op.Slice(bias, *ends)
    if marks:
        hidden: Any = op.Constant(value_float=HIDDEN)
        bias = op.Mul(op.Cast(op.Not(bias), to=ir.DataType.FLOAT), hidden)
    return _operator("ClassAttention")(q, k, bias, scale=scale, row=row)


def _keep_tokens(x: Any, score: Any, keep: Any, protected: int, fuse: bool) -> Any:
    select = _operator("FuseTokens" if fuse else "KeepTokens")
    y, kept, slot = select(x, score, _count(keep), protected=protected)
    return y, slot, kept


def _prune_merge(x: Any, size: Any, score: Any, pruned: Any, keep: Any, protected: int) -> Any:
    step = _operator("PruneMerge")
    y, out_size, kept, slot = step(x, size, score, pruned, _count(keep), protected=protected)
    return y, out_size, slot, kept


def _token_energy(metric: Any, size: Any, margin: float, protected: int) -> Any:
    return _operator("TokenEnergy")(metric, size, margin=margin, protected=protected)


def _redundant_merge(x: Any, size: Any, metric: Any, score: Any, keep: Any, protected: int) -> Any:
    merge = _operator("RedundantMerge")
    y, out_size, kept, slot = merge(x, size, metric, score, _count(keep), protected=protected)
    return y, out_size, slot, kept


def _split_merge(x: Any, size: Any, metric: Any, score: Any, keep: Any, protected: int) -> Any:
    merge = _operator("SplitMerge")
    y, out_size, kept, slot = merge(x, size, metric, score, _count(keep), protected=protected)
    return y, out_size, slot, kept


def _select_diverse(x: Any, size: Any, keep: Any, protected: int) -> Any:
    y, kept, slot = _operator("SelectDiverse")(x, size, _count(keep), protected=protected)
    return y, slot, kept


def _soft_merge(x: Any, values: Any, logits: Any, protected: int) -> Any:
    y, kept, slot = _operator("SoftMerge")(x, values, logits, protected=protected)
    return y, slot, kept


def _gather_tokens(x: Any, index: Any) -> Any:
    return _operator("GatherTokens")(x, index)


def _restore_tokens(x: Any, slot: Any, aside: Any) -> Any:
    return _operator("RestoreTokens")(x, slot, aside)


def _adaptive_gate(x: Any, gate: Any, bias: Any) -> Any:
    return _operator("AdaptiveGate")(x, gate, bias)


def _adaptive_mlp(x: Any, k: Any, w1: Any, b1: Any, w2: Any, b2: Any, activation: str) -> Any:
    learners = int(w1.shape[0])
    return _operator("AdaptiveMLP")(x, k, w1, b1, w2, b2, learners=learners, activation=activation)


def _adaptive_gated_mlp(
    x: Any, k: Any, w1: Any, b1: Any, v: Any, c: Any, w2: Any, b2: Any, activation: str
) -> Any:
    layer, learners = _operator("AdaptiveGatedMLP"), int(w1.shape[0])
    return layer(x, k, w1, b1, v, c, w2, b2, learners=learners, activation=activation)


def _expert_mlp(x: Any, run: Any, w1: Any, b1: Any, w2: Any, b2: Any, activation: str) -> Any:
    experts = int(w1.shape[0])
    return _operator("ExpertMLP")(x, run, w1, b1, w2, b2, experts=experts, activation=activation)


def _sparse_linear(
    x: Any, weight: Any, threshold: Any, most_tokens: int, compact: bool = False
) -> Any:
    narrow = weight.dtype != x.dtype
    name = "SparseLinearBf16" if narrow else "CompactSparseLinear" if compact else "SparseLinear"
    return _operator(name)(x, weight, threshold, most_tokens=most_tokens)


def _sparse_gated_ffn(
    x: Any, gate: Any, up: Any, down: Any, threshold: Any, activation: str, most_tokens: int
) -> Any:
    operators = BY_ACTIVATION if gate.dtype == x.dtype else BF16_BY_ACTIVATION
    layer = _operator(operators[activation].name)
    return layer(x, gate, up, down, threshold, most_tokens=most_tokens)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The exporter's custom translation table."""
    import thresher.kernels.ops  # noqa: F401

    ours = torch.ops.thresher
    return {
        ours.adaptive_gate.default: _adaptive_gate,
        ours.adaptive_mlp.default: _adaptive_mlp,
        ours.adaptive_gated_mlp.default: _adaptive_gated_mlp,
        ours.expert_mlp.default: _expert_mlp,
        ours.bipartite_merge.default: _bipartite_merge,
        ours.class_attention.default: _class_attention,
        ours.keep_tokens.default: _keep_tokens,
        ours.prune_merge.default: _prune_merge,
        ours.token_energy.default: _token_energy,
        ours.redundant_merge.default: _redundant_merge,
        ours.split_merge.default: _split_merge,
        ours.select_diverse.default: _select_diverse,
        ours.soft_merge.default: _soft_merge,
        ours.gather_tokens.default: _gather_tokens,
        ours.restore_tokens.default: _restore_tokens,
        ours.sparse_linear.default: _sparse_linear,
        ours.sparse_gated_ffn.default: _sparse_gated_ffn,
        torch.sym_max: lambda a, b: op.Max(a, b),
        torch.sym_min: lambda a, b: op.Min(a, b),
    }
