"""``sparse_gated_ffn`` in standard ONNX operators: one operator for each activation."""

from __future__ import annotations

from thresher.kernels.body import thresholded
from thresher.kernels.operator import Operator

_GATE = "    logits = MatMul (x, gate)\n"
_OPENED = """
    columns = Transpose <perm = [1, 0]> (up)
    opened = MatMul (x, columns)
    product = Mul (h, opened)
"""


def _gated(name: str, activate: str) -> Operator:
    """The operator whose ``activate`` makes ``h`` of ``logits``."""
    return Operator(
        name=name,
        torch_name="sparse_gated_ffn",
        inputs={"x": "T", "gate": "T", "up": "T", "down": "T", "threshold": "tensor(float)"},
        outputs={"y": "T"},
        attributes={"most_tokens": int},
        cuda=False,
        product=True,
        dense=_GATE + activate + _OPENED + "    y = MatMul (product, down)\n",
        body=_GATE
        + activate
        + thresholded("h", "x")
        + _OPENED
        + """
    kept = Where (dropped, zero, product)
    y = MatMul (kept, down)
""",
    )


BY_ACTIVATION = {
    "silu": _gated("SparseSwiGLU", "    s = Sigmoid (logits)\n    h = Mul (logits, s)\n"),
    "gelu": _gated("SparseGeGLU", "    h = Gelu (logits)\n"),
    "relu": _gated("SparseReGLU", "    h = Relu (logits)\n"),
}
