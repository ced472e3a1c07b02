"""Static eight-bit integers for linear layers, written into an ONNX model as Q/DQ pairs.

A linear layer is a product with a weight.  Its weight is stored as int8 with a scale for each output
channel, its input rounded to int8 with one scale, both symmetric::

    q = clip(round(x / s), -128, 127),  s = limit / 127        (ties to even)

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

STEPS = 127  # on either side of zero; what is clipped below takes one more
AXIS = "int8_axis"  # the name of a zero: the axis under which a Gemm is lifted
_LEAST = np.finfo(np.float32).tiny  # of a scale: below it a quotient may overflow

Floats = NDArray[np.float32]


def prepare(model: ir.Model) -> list[ir.Value]:
    """Write every linear layer as a MatMul, in place; returns the tensors that they read, each once.

    Raises:
        RefusedError: there is no linear layer.
    """
    lifted: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if not node.domain and node.op_type == "Gemm" and _plain(node) and _weighted(node):
            _as_matmul(node, lifted)
    _drop_unread(model.graph)
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
        model: behind :func:`prepare`.
        limits: by name of each tensor that :func:`prepare` returns, the largest magnitude that is kept.
    """
    pairs: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    nodes = list(_linears(model))
    for node in nodes:
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert x.name is not None
        assert weight is not None
        assert weight.name is not None
        if x.name not in pairs:
            pairs[x.name] = _rounded(node, x, scale(limits[x.name]))
        if weight.name not in weights:
            weights[weight.name] = _stored(node, weight)
        node.replace_input_with(0, pairs[x.name])
        node.replace_input_with(1, weights[weight.name])
    _drop_unread(model.graph)
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
    for node in model.graph:
        if not node.domain and node.op_type == "MatMul" and _weighted(node):
            yield node


def _weighted(node: ir.Node) -> bool:
    """Whether a product is one of a computed tensor with a stored float32 matrix."""
    x, weight = node.inputs[:2]
    if x is None or weight is None or x.is_initializer() or weight.const_value is None:
        return False
    matrix = weight.is_initializer() and len(weight.const_value.shape) == 2
    return matrix and weight.dtype == ir.DataType.FLOAT


def _plain(node: ir.Node) -> bool:
    """Whether a Gemm is nothing but ``xW + b``."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    scaled = any(given.get(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return not scaled and not given.get("transA", 0)


def _as_matmul(node: ir.Node, lifted: dict[ir.Value, ir.Value]) -> None:
    """A Gemm as a MatMul and an Add under one more axis.

    ONNX Runtime makes a Gemm of every MatMul and Add of matrices, and computes that on integers only
    with a bias of integers, which TensorRT refuses.
    """
    graph = node.graph
    assert graph is not None
    x, weight, *bias = node.inputs
    assert x is not None
    assert weight is not None
    assert weight.const_value is not None
    axis = graph.initializers.get(AXIS) or _initializer(graph, AXIS, np.zeros(1, np.int64))
    if x not in lifted:
        up = _node("Unsqueeze", [x, axis], node, f"{x.name}_lifted")
        up.outputs[0].shape = None if x.shape is None else ir.Shape([1, *x.shape])
        graph.insert_before(node, up)
        lifted[x] = up.outputs[0]
    if "transB" in node.attributes and node.attributes["transB"].as_int():
        matrix = np.ascontiguousarray(weight.const_value.numpy().T)
        name = f"{weight.name}_transposed"
        weight = graph.initializers.get(name) or _initializer(graph, name, matrix)
    made = [_node("MatMul", [lifted[x], weight], node, f"{node.name}_product")]
    if bias and bias[0] is not None:
        made.append(_node("Add", [made[-1].outputs[0], bias[0]], node, f"{node.name}_sum"))
    down = _node("Squeeze", [made[-1].outputs[0], axis], node, f"{node.name}_flat")
    output, result = node.outputs[0], down.outputs[0]
    for one in made:
        one.outputs[0].shape = None if output.shape is None else ir.Shape([1, *output.shape])
    result.type, result.shape = output.type, output.shape
    graph.insert_before(node, [*made, down])
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = output.name


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
    assert graph is not None
    assert weight.const_value is not None
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
    made.outputs[0].name = name
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


def _drop_unread(graph: ir.Graph) -> None:
    """Forget weights that nobody reads any more."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
