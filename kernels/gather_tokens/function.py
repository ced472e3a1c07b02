"""``gather_tokens`` in standard ONNX operators."""

from __future__ import annotations

from thresher.kernels.operator import ANY, Operator

OPERATOR = Operator(
    name="GatherTokens",
    torch_name="gather_tokens",
    inputs={"x": "T", "index": "tensor(int64)"},
    outputs={"y": "T"},
    shapes={"y": "x0 index1 x2+"},
    types=ANY,
    body="""
    last = Constant <value = int64[1] {-1}> ()
    index_at = Unsqueeze (index, last)
    y = GatherND <batch_dims = 1> (x, index_at)
""",
)
