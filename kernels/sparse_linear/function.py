"""``sparse_linear`` in standard ONNX operators.

``SparseLinear`` masks its input: every back end takes that, and none saves anything by it.
``CompactSparseLinear`` multiplies with the weights of active channels only, whose number depends on the
data.  ``SparseLinearBf16`` keeps its weights in bfloat16.
"""

from __future__ import annotations

from thresher.kernels.body import thresholded
from thresher.kernels.operator import Operator

_KEPT = thresholded("x", "x") + "    kept = Where (dropped, zero, x)\n"
_DENSE = "    y = MatMul (x, weight)\n"
_INPUTS = {"x": "T", "weight": "T", "threshold": "tensor(float)"}

MASK = Operator(
    name="SparseLinear",
    torch_name="sparse_linear",
    inputs=_INPUTS,
    outputs={"y": "T"},
    attributes={"most_tokens": int},
    cuda=False,
    dense=_DENSE,
    product=True,
    body=_KEPT + "    y = MatMul (kept, weight)\n",
)

COMPACT = Operator(
    name="CompactSparseLinear",
    torch_name="sparse_linear",
    inputs=_INPUTS,
    outputs={"y": "T"},
    attributes={"most_tokens": int},
    cuda=False,
    product=True,
    portable=False,
    dense=_DENSE,
    body=_KEPT
    + """
    # Channels that some token keeps.
    stays = Not (dropped)
    ones = Cast <to = 1> (stays)
    rows = Flatten <axis = -1> (ones)
    i0 = Constant <value = int64[1] {0}> ()
    uses = ReduceSum <keepdims = 0> (rows, i0)
    active = Cast <to = 9> (uses)
    channels = Compress <axis = -1> (kept, active)
    used = Compress <axis = 0> (weight, active)
    y = MatMul (channels, used)
""",
)

BF16 = Operator(
    name="SparseLinearBf16",
    torch_name="sparse_linear",
    inputs=_INPUTS | {"weight": "tensor(bfloat16)"},
    outputs={"y": "T"},
    attributes={"most_tokens": int},
    cuda=False,
    product=True,
    types=("tensor(float)",),
    dense="    wide = CastLike (weight, x)\n    y = MatMul (x, wide)\n",
    body=_KEPT
    + """
    wide = CastLike (weight, x)
    y = MatMul (kept, wide)
""",
)
