"""Runs a lowered Program where it would run, and compares it with the eager one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from thresher.compiler.lowering.inline import inlined
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.lowering.ties import order_ties
from thresher.compiler.program import Program
from thresher.kernels.registry import DOMAIN

Array = NDArray[Any]


def proto(program: Program, precision: str = "fp32") -> onnx.ModelProto:
    made: onnx.ModelProto = ir.to_proto(to_onnx(program, precision=precision))
    onnx.checker.check_model(made)
    return made


def on_onnxruntime(model: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> dict[str, Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in feeds.items()})
    return dict(zip(names, values, strict=True))


def on_openvino(model: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> dict[str, Array]:
    import openvino as ov

    read = ov.Core().read_model(inlined(model).SerializeToString())
    order_ties(read)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    result = ov.Core().compile_model(read, "CPU", settings)(
        {name: value.numpy() for name, value in feeds.items()}
    )
    return {port.any_name: np.array(value) for port, value in result.items()}


RUN = {"onnxruntime": on_onnxruntime, "openvino": on_openvino}


def error(found: dict[str, Array], program: Program, feeds: dict[str, torch.Tensor]) -> float:
    """Largest difference from the eager program, over the largest value of its outputs."""
    expected = program.run(feeds)
    assert list(found) == list(expected)
    return max(
        float(np.abs(found[name] - value.numpy()).max() / value.abs().max())
        for name, value in expected.items()
    )


def ours(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that a pass inserted."""
    return [node for node in model.graph.node if node.domain == DOMAIN]
