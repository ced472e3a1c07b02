"""``adaptive_gated_mlp`` in standard ONNX operators: the body of ``adaptive_mlp`` with a second factor."""

from __future__ import annotations

from thresher.kernels.adaptive_mlp.function import operator

_FACTOR = """v_{n} = Gather (v, i{n})
    c_{n} = Gather (c, i{n})
    opened{n} = MatMul (in{n}, v_{n})
    factor{n} = Add (opened{n}, c_{n})
    hidden{n} = Mul (bent{n}, factor{n})"""

OPERATOR = operator("AdaptiveGatedMLP", "adaptive_gated_mlp", _FACTOR, v="T", c="T")
