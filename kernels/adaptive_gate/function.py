"""``adaptive_gate`` in standard ONNX operators."""

from __future__ import annotations

from thresher.kernels.operator import Operator

OPERATOR = Operator(
    name="AdaptiveGate",
    torch_name="adaptive_gate",
    inputs={"x": "T", "gate": "tensor(float)", "bias": "tensor(float)"},
    outputs={"k": "tensor(int64)"},
    shapes={"k": "x0 x1"},
    triton=False,
    cuda=False,
    body="""
    x32 = Cast <to = 1> (x)
    columns = Transpose <perm = [1, 0]> (gate)
    product = MatMul (x32, columns)
    logits = Add (product, bias)
    k = ArgMax <axis = -1, keepdims = 0> (logits)
""",
)
