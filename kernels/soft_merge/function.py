"""``soft_merge`` in standard ONNX operators: one softmax and one product."""

from __future__ import annotations

from thresher.kernels.operator import Operator

OPERATOR = Operator(
    name="SoftMerge",
    torch_name="soft_merge",
    inputs={"x": "T", "values": "T", "logits": "tensor(float)"},
    outputs={"y": "T", "kept": "tensor(int64)", "slot": "tensor(int64)"},
    attributes={"protected": int},
    triton=False,
    cuda=False,
    body="""
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64 {1}> ()
    v0 = Constant <value = int64[1] {0}> ()
    v1 = Constant <value = int64[1] {1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    p = Constant <value_int: int = @protected> ()
    pv = Reshape (p, v1)

    # Means.
    pool = Slice (logits, pv, end, v1)
    weight = Softmax <axis = 1> (pool)
    weight_t = Transpose <perm = [0, 2, 1]> (weight)
    averaged = Slice (values, pv, end, v1)
    averaged32 = Cast <to = 1> (averaged)
    means32 = MatMul (weight_t, averaged32)
    means = CastLike (means32, x)
    prefix_x = Slice (x, v0, pv, v1)
    y = Concat <axis = 1> (prefix_x, means)

    # Maps.
    bv = Shape <start = 0, end = 1> (x)
    prefix = Range (i0, p, i1)
    prefix_shape = Concat <axis = 0> (bv, pv)
    prefix_rows = Expand (prefix, prefix_shape)
    heaviest = ArgMax <axis = 1, keepdims = 0> (weight)
    kept_behind = Add (heaviest, p)
    kept = Concat <axis = 1> (prefix_rows, kept_behind)
    home = ArgMax <axis = 2, keepdims = 0> (weight)
    slot_behind = Add (home, p)
    slot = Concat <axis = 1> (prefix_rows, slot_behind)
""",
)
