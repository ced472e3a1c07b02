"""What ONNX Runtime's CUDA provider computes in bfloat16, asked of the types in a model.

From ``docs/OperatorKernels.md`` in the sources of ONNX Runtime, for opset 20.  Where the provider has no
kernel, the CPU has none either, and a session does not open.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# fmt: off
KERNELS = frozenset({
    "Abs", "Add", "Cast", "CastLike", "Compress", "Concat", "Constant", "ConstantOfShape", "Div",
    "Dropout", "Erf", "Exp", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "Identity", "If", "IsInf", "IsNaN", "LayerNormalization", "Loop", "MatMul", "Max", "Min", "Mod",
    "Mul", "Neg", "Pow", "ReduceSum", "Relu", "Reshape", "Scan", "ScatterElements", "ScatterND",
    "Shape", "Sigmoid", "Sign", "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
    "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
})
# fmt: on


def without_kernel(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Nodes that read or make bfloat16 and have no kernel for it, each with the function that it is in.

    A node of a body is found once for each call.
    """
    import onnx.inliner
    import onnx.shape_inference

    if not _narrow(model):
        return
    flat = onnx.inliner.inline_local_functions(_without_weights(model))
    flat = onnx.shape_inference.infer_shapes(flat)
    values = (*flat.graph.input, *flat.graph.value_info, *flat.graph.output)
    narrow = {
        value.name
        for value in values
        if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    }
    bodies = {function.name: f"{function.domain}::{function.name}" for function in model.functions}
    for node in flat.graph.node:
        if node.op_type not in KERNELS and narrow.intersection((*node.input, *node.output)):
            yield node, bodies.get(node.name.partition("/")[0], "")


def _narrow(model: onnx.ModelProto) -> bool:
    import onnx

    graph, narrow = model.graph, onnx.TensorProto.BFLOAT16
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    return narrow in kinds


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs in place of its weights, which may be too large to be copied."""
    import onnx

    small = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    small.functions.extend(model.functions)
    small.graph.name = model.graph.name
    small.graph.node.extend(model.graph.node)
    small.graph.value_info.extend(model.graph.value_info)
    small.graph.output.extend(model.graph.output)
    small.graph.input.extend(model.graph.input)
    given = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in given:
            made = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            small.graph.input.append(made)
    return small
