"""One operator as a model, to try whether a library of native kernels loads and computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from thresher.compiler.errors import MissingRequirementError
from thresher.kernels.operator import DOMAIN, VERSION
from thresher.runtime.backends.base import Array

OPSET, IR_VERSION = 20, 10


def trial(library: Path, run: Callable[[bytes, Mapping[str, Array]], Array]) -> None:
    """Run one operator.

    Args:
        library: what is tried.
        run: takes an ONNX model without function bodies and its inputs, and returns its output.

    Raises:
        MissingRequirementError: the output is wrong.
    """
    import onnx.helper as make

    x, index = np.arange(6.0, dtype=np.float32).reshape(1, 3, 2), np.array([[2, 0]])
    node = make.make_node("GatherTokens", ["x", "index"], ["y"], domain=DOMAIN)
    graph = make.make_graph(
        [node],
        "trial",
        [
            make.make_tensor_value_info("x", 1, x.shape),
            make.make_tensor_value_info("index", 7, index.shape),
        ],
        [make.make_tensor_value_info("y", 1, (1, 2, 2))],
    )
    opsets = [make.make_opsetid("", OPSET), make.make_opsetid(DOMAIN, VERSION)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    y = run(model.SerializeToString(), {"x": x, "index": index})
    if not np.array_equal(y, x[:, [2, 0]]):
        raise MissingRequirementError(f"the kernels {library} compute something else: rebuild them")
