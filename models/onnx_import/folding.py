"""Nodes on constants, computed once: by our own operators, else by ONNX Runtime."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import helper

from thresher.compiler.errors import RefusedError
from thresher.models.onnx_import.evaluate import compute
from thresher.models.onnx_import.node import Node, torch_tensor
from thresher.models.onnx_import.values import Host, Value


def fold(node: Node, values: list[Value | None]) -> list[Value]:
    """Outputs of a node whose inputs are known.

    Raises:
        RefusedError: neither we nor ONNX Runtime can compute it; ours is the reason given.
    """
    try:
        return compute(node, values)
    except RefusedError:
        try:
            return _by_runtime(node, values)
        except Exception:  # of many kinds; the first refusal says it better
            pass
        raise


def _by_runtime(node: Node, values: list[Value | None]) -> list[Value]:
    import onnxruntime

    attributes = {
        name: ir.to_proto(value) if isinstance(value, ir.TensorProtocol) else value
        for name, value in node.attributes.items()
    }
    tensors = [v.tensor() if isinstance(v, Host) else v for v in values]
    made = [
        ir.to_proto(ir.tensor(tensor.contiguous().numpy(), name=name))
        for name, tensor in dict(zip(node.inputs, tensors, strict=True)).items()
        if tensor is not None
    ]
    graph = helper.make_graph(
        [helper.make_node(node.op, node.inputs, node.outputs, domain=node.domain, **attributes)],
        "constant",
        [],
        [onnx.ValueInfoProto(name=name) for name in node.outputs],
        made,
    )
    opsets = [helper.make_opsetid(node.domain, node.opset if not node.domain else 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [torch_tensor(ir.tensor(array)) for array in session.run(None, {})]
