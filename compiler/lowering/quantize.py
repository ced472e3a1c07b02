"""Static eight-bit integers for linear layers, written into an ONNX model as Q/DQ pairs.

A linear layer is a product with a weight.  Its weight is stored as int8 with a scale for each output
channel, its input rounded to int8 with one scale, both symmetric::

    q = clip(round(x / s), -127, 127),  s = limit / 127        (ties to even)

Every back end fuses a pair with the product behind it.  Outputs are not rounded: bias, residual adds,
norms, softmax, GELU, attention products and token scores read float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from thresher.compiler.errors import RefusedError

STEPS = 127  # on either side of zero; -128 would have no counterpart
_LEAST = np.finfo(np.float32).tiny  # of a scale: below it a quotient may overflow

Floats = NDArray[np.float32]


def linear_inputs(model: ir.Model) -> list[ir.Value]:
    """The tensors that linear layers read, each once, in the order of the graph.

    Raises:
        RefusedError: there is no linear layer.
    """
    found = list(dict.fromkeys(node.inputs[0] for node in _linears(model)))
    if not found:
        raise RefusedError(
            "the model has no product with a float32 weight, and int8 is for those: export it with"
            " --precision fp32"
        )
    return [value for value in found if value is not None]


def quantize(model: ir.Model, limits: Mapping[str, float]) -> int:
    """Rewrite every linear layer in place; returns how many there are.

    Args:
        model: as :func:`~thresher.compiler.lowering.onnx_export.to_onnx` returns it, in float32.
        limits: by name of each tensor in :func:`linear_inputs`, the largest magnitude that is kept.
    """
    pairs: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    nodes = list(_linears(model))
    for node in nodes:
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None and x.name is not None and weight is not None
        if x.name not in pairs:
            pairs[x.name] = _rounded(node, x, scale(limits[x.name]))
        if node.op_type == "Gemm":
            node = _as_matmul(node)
            weight = node.inputs[1]
            assert weight is not None
        assert weight.name is not None
        if weight.name not in weights:
            weights[weight.name] = _stored(node, weight)
        node.replace_input_with(0, pairs[x.name])
        node.replace_input_with(1, weights[weight.name])
    for name in [n for n, value in model.graph.initializers.items() if _unread(value)]:
        del model.graph.initializers[name]
    return len(nodes)


def scale(limit: float | Floats) -> Floats:
    """``limit / 127`` in float32; 1 where the limit is zero, so that zeros stay zeros."""
    limits = np.asarray(limit, np.float32)
    return np.where(limits == 0, np.float32(1), np.maximum(limits / STEPS, _LEAST))


def quantized_weight(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """``int8 [in, out]`` and scales ``[out]`` of a weight ``[in, out]``; the largest of a channel is 127."""
    scales = scale(np.abs(weight).max(axis=0, initial=0))
    rounded = np.rint(weight / scales).clip(-STEPS, STEPS)
    return rounded.astype(np.int8), scales


def _linears(model: ir.Model) -> Iterator[ir.Node]:
    """Products of a computed float32 tensor with a stored matrix; Gemm only as ``xW + b``."""
    for node in model.graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        x, weight = node.inputs[0], node.inputs[1]
        if x is None or weight is None or x.is_initializer() or weight.const_value is None:
            continue
        matrix = weight.is_initializer() and weight.const_value.shape.rank() == 2
        if matrix and weight.dtype == ir.DataType.FLOAT and _plain(node):
            yield node


def _plain(node: ir.Node) -> bool:
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return all(given.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not given.get(
        "transA", 0
    )


def _as_matmul(node: ir.Node) -> ir.Node:
    """A Gemm as the MatMul and Add that all back ends fuse; returns the MatMul."""
    graph = node.graph
    assert graph is not None
    x, weight, *bias = node.inputs
    assert weight is not None and weight.const_value is not None
    transposed = node.attributes.get("transB")
    if transposed is not None and transposed.as_int():
        matrix = np.ascontiguousarray(weight.const_value.numpy().T)
        weight = _initializer(graph, f"{weight.name}_transposed", matrix)
    product = _node("MatMul", [x, weight], node, "product")
    made = [product]
    if bias and bias[0] is not None:
        made.append(_node("Add", [product.outputs[0], bias[0]], node, "sum"))
    output, result = node.outputs[0], made[-1].outputs[0]
    result.type, result.shape = output.type, output.shape
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    result.name = output.name
    graph.remove(node, safe=True)
    return product


def _rounded(before: ir.Node, x: ir.Value, step: Floats) -> ir.Value:
    """``x`` through a QuantizeLinear and a DequantizeLinear, put in front of its first reader."""
    graph = before.graph
    assert graph is not None
    scales = _initializer(graph, f"{x.name}_scale", step)
    zero = _initializer(graph, f"{x.name}_zero", np.zeros((), np.int8))
    down = _node("QuantizeLinear", [x, scales, zero], before, f"{x.name}_int8", ir.DataType.INT8)
    up = _node("DequantizeLinear", [down.outputs[0], scales, zero], before, f"{x.name}_rounded")
    for node in (down, up):
        node.outputs[0].shape = x.shape
    graph.insert_before(before, [down, up])
    return up.outputs[0]


def _stored(before: ir.Node, weight: ir.Value) -> ir.Value:
    """A weight kept as int8 with its scales, and the DequantizeLinear that reads them."""
    graph = before.graph
    assert graph is not None and weight.const_value is not None
    rounded, step = quantized_weight(weight.const_value.numpy())
    name = weight.name
    operands = [
        _initializer(graph, f"{name}_int8", rounded),
        _initializer(graph, f"{name}_scale", step),
        _initializer(graph, f"{name}_zero", np.zeros(step.shape, np.int8)),
    ]
    up = _node("DequantizeLinear", operands, before, f"{name}_rounded", axis=1)
    up.outputs[0].shape = ir.Shape(rounded.shape)
    graph.insert_before(before, [up])
    return up.outputs[0]


def _node(
    kind: str,
    inputs: list[Any],
    origin: ir.Node,
    name: str,
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: int,
) -> ir.Node:
    """A node that counts to the same module of the model as the one it is made for."""
    made = ir.node(kind, inputs, attributes=attributes, name=f"{origin.name}_{name}")
    made.metadata_props.update(origin.metadata_props)
    made.outputs[0].name = name if kind.endswith("Linear") else f"{origin.name}_{name}"
    made.outputs[0].type = ir.TensorType(dtype)
    return made


def _initializer(graph: Any, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _unread(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output()
