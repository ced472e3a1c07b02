"""For back ends that know no model-local functions."""

from __future__ import annotations

import onnx
import onnx.inliner


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every function body in place of its node."""
    return onnx.inliner.inline_local_functions(model)
