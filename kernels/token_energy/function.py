"""``token_energy`` in standard ONNX operators.

``f(x) = exp(min(x, m) - m) - 1``, plus x above the margin m: plain passes over the matrix of pairs, which
ONNX Runtime makes sooner than a choice between two of them.
"""

from __future__ import annotations

from thresher.kernels.body import HEADS, UNIT
from thresher.kernels.operator import Operator

OPERATOR = Operator(
    name="TokenEnergy",
    torch_name="token_energy",
    inputs={"metric": "T", "size": "tensor(float)"},
    outputs={"score": "tensor(float)"},
    shapes={"score": "metric0 metric2"},
    attributes={"margin": float, "protected": int},
    body="""
    v1 = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    zero = Constant <value = float {0.0}> ()
    one = Constant <value = float {1.0}> ()
    m = Constant <value_float: float = @margin> ()
    p = Constant <value_int: int = @protected> ()
    pv = Reshape (p, v1)
"""
    + HEADS
    + """    axes = Constant <value = int64[3] {0, 2, 3}> ()
    whole = Shape (metric)
    sum_shape = Gather (whole, axes)
    direction = Reshape (sum_flat, sum_shape)
"""
    + UNIT
    + """    pool = Slice (unit, pv, end, v1)
    across = Transpose <perm = [0, 2, 1]> (pool)
    cosine = MatMul (unit, across)

    # The share that each token has in the mean; nobody has one where all are padding.
    pool_size = Slice (size, pv, end, v1)
    there = Greater (pool_size, zero)
    real = Cast <to = 1> (there)
    count = ReduceSum (real, last)
    total = Max (count, one)
    share = Div (real, total)
    share_column = Unsqueeze (share, last)

    bounded = Min (cosine, m)
    shifted = Sub (bounded, m)
    power = Exp (shifted)
    below = Sub (power, one)
    alike = ThresholdedRelu <alpha: float = @margin> (cosine)
    felt = Add (below, alike)
    score_column = MatMul (felt, share_column)
    score = Squeeze (score_column, last)
""",
)
