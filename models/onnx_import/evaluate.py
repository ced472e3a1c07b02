"""Evaluating one ONNX node with torch."""

from __future__ import annotations

from typing import Any

from thresher.compiler.errors import RefusedError
from thresher.models.onnx_import import (  # noqa: F401  (they fill the table of operators)
    ops_attention,
    ops_elementwise,
    ops_index,
    ops_layers,
    ops_reduce,
    ops_resize,
    ops_shape,
)
from thresher.models.onnx_import.host_ops import HOST_HANDLERS
from thresher.models.onnx_import.node import HANDLERS, Call, Node
from thresher.models.onnx_import.values import Host, Value


def compute(node: Node, values: list[Value | None]) -> list[Value]:
    """Outputs of one node.  Shape arithmetic stays on the host where it can.

    Raises:
        RefusedError: the node cannot be evaluated; names it and says why.
    """
    call = Call(node, values)
    try:
        result: Any = None
        if node.key in HOST_HANDLERS and all(v is None or isinstance(v, Host) for v in values):
            result = HOST_HANDLERS[node.key](call)
        if result is None:
            result = HANDLERS[node.key](call)
    except Exception as error:  # torch raises many kinds; each means that this node is beyond us
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise RefusedError(
            f"node {node.name!r} ({node.key}) cannot be imported: {reason.strip()};"
            " simplify the model there, fix the sizes of its inputs, or export it again"
        ) from error
    return list(result) if isinstance(result, list | tuple) else [result]
