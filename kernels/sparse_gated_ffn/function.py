"""``sparse_gated_ffn`` in standard ONNX operators: one operator for each activation and type of weights."""

from __future__ import annotations

from thresher.kernels.body import thresholded
from thresher.kernels.operator import FLOATS, Operator

_NARROW = """
    gate = CastLike (gate_bf16, x)
    up = CastLike (up_bf16, x)
    down = CastLike (down_bf16, x)
"""
_LOGITS = "    logits = MatMul (x, gate)\n"
_OPENED = """
    columns = Transpose <perm = [1, 0]> (up)
    opened = MatMul (x, columns)
    product = Mul (h, opened)
"""
_KEPT = "    kept = Where (dropped, zero, product)\n    y = MatMul (kept, down)\n"


def _gated(name: str, activate: str, narrow: bool) -> Operator:
    """The operator whose ``activate`` makes ``h`` of ``logits``; ``narrow`` weights are bfloat16."""
    kind, end = ("tensor(bfloat16)", "_bf16") if narrow else ("T", "")
    weights = {f"{weight}{end}": kind for weight in ("gate", "up", "down")}
    begin = (_NARROW if narrow else "") + _LOGITS + activate
    return Operator(
        name=f"{name}Bf16" if narrow else name,
        torch_name="sparse_gated_ffn",
        inputs={"x": "T", **weights, "threshold": "tensor(float)"},
        outputs={"y": "T"},
        attributes={"most_tokens": int},
        types=("tensor(float)",) if narrow else FLOATS,
        cuda=False,
        product=True,
        dense=begin + _OPENED + "    y = MatMul (product, down)\n",
        body=begin + thresholded("h", "x") + _OPENED + _KEPT,
    )


_ACTIVATE = {
    "silu": ("SparseSwiGLU", "    s = Sigmoid (logits)\n    h = Mul (logits, s)\n"),
    "gelu": ("SparseGeGLU", "    h = Gelu (logits)\n"),
    "relu": ("SparseReGLU", "    h = Relu (logits)\n"),
}
BY_ACTIVATION = {key: _gated(*made, narrow=False) for key, made in _ACTIVATE.items()}
BF16_BY_ACTIVATION = {key: _gated(*made, narrow=True) for key, made in _ACTIVATE.items()}
