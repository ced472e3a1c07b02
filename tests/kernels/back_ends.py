"""Runs one operator as an ONNX node with its body, on ONNX Runtime and (inlined) on OpenVINO."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.inliner
from numpy.typing import NDArray

from thresher.compiler.lowering.ties import order_ties
from thresher.kernels.registry import DOMAIN, OPERATORS, PLUGIN, VERSION

Array = NDArray[Any]
OPSET = 20
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def model(
    name: str, ranks: tuple[int, ...], token_type: str, attributes: tuple[tuple[str, Any], ...],
    outputs: int | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """One node with every axis of every input symbolic."""
    operator = OPERATORS[name]
    tokens = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(token_type))

    def kind(text: str) -> int:
        return (
            tokens if text == "T" else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[text]))
        )

    inputs = [
        onnx.helper.make_tensor_value_info(n, kind(t), [f"{n}{axis}" for axis in range(rank)])
        for (n, t), rank in zip(operator.inputs.items(), ranks, strict=True)
    ]
    wanted = list(operator.outputs.items())[:outputs]
    results = [
        onnx.helper.make_tensor_value_info(n, kind(t), [f"{n}{axis}" for axis in range(rank)])
        for n, t in wanted
        for rank in [ranks[0] if n == "y" else 2]
    ]
    node = onnx.helper.make_node(
        name,
        list(operator.inputs),
        [n for n, _ in wanted],
        domain=DOMAIN,
        **dict(attributes),
        **PLUGIN,
    )
    graph = onnx.helper.make_graph([node], name, inputs, results)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    made = onnx.helper.make_model(
        graph, opset_imports=opsets, functions=[operator.function(OPSET, outputs)], ir_version=10
    )
    onnx.checker.check_model(made)
    return made


@cache
def _onnxruntime(*signature: Any) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model(*signature).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@cache
def _openvino(*signature: Any) -> Any:
    import openvino as ov

    flat = onnx.inliner.inline_local_functions(model(*signature))
    read = ov.Core().read_model(flat.SerializeToString())
    order_ties(read)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return ov.Core().compile_model(read, "CPU", settings)


def run(back_end: str, name: str, arguments: dict[str, Array], **attributes: Any) -> list[Array]:
    """All outputs of one operator; ``arguments`` by input name in order."""
    token_type = next(
        str(arguments[n].dtype) for n, t in OPERATORS[name].inputs.items() if t == "T"
    )
    ranks = tuple(value.ndim for value in arguments.values())
    signature = (name, ranks, token_type, tuple(sorted(attributes.items())))
    if back_end == "onnxruntime":
        return list(_onnxruntime(*signature).run(None, arguments))
    compiled = _openvino(*signature)
    result = compiled(arguments)
    return [np.array(result[n]) for n in OPERATORS[name].outputs]
