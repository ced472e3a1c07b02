"""``class_attention`` in standard ONNX operators: one row of the attention map, not the map."""

from __future__ import annotations

from thresher.kernels.operator import Operator

BODY = """
    v1 = Constant <value = int64[1] {1}> ()
    v2 = Constant <value = int64[1] {2}> ()
    r0 = Constant <value_int: int = @row> ()
    row_start = Reshape (r0, v1)
    row_end = Add (row_start, v1)
    one_query = Slice (q, row_start, row_end, v2)
    query = Cast <to = 1> (one_query)
    keys = Cast <to = 1> (k)
    factor = Constant <value_float: float = @scale> ()
    columns = Transpose <perm = [0, 1, 3, 2]> (keys)
    product = MatMul (query, columns)
    scaled = Mul (product, factor)
    logits = Add (scaled, bias)
    attention = Softmax <axis = -1> (logits)
    v12 = Constant <value = int64[2] {1, 2}> ()
    score = ReduceMean <keepdims = 0> (attention, v12)
"""

OPERATOR = Operator(
    name="ClassAttention",
    torch_name="class_attention",
    # bias is broadcastable to [B, H, 1, N]; a scalar 0 where there is none.
    inputs={"q": "T", "k": "T", "bias": "tensor(float)"},
    outputs={"score": "tensor(float)"},
    shapes={"score": "k0 k2"},
    attributes={"scale": float, "row": int},
    body=BODY,
)
