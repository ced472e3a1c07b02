"""Statements that several function bodies begin with."""

from __future__ import annotations

# Reads x, its token count nv, and the constants i0 = 0, i1 = 1, last = [-1].
ROWS = """
    # Rows of the flattened batch: item b starts at b n.
    bv = Shape <start = 0, end = 1> (x)
    b = Squeeze (bv)
    batch = Range (i0, b, i1)
    batch_column = Unsqueeze (batch, last)
    start = Mul (batch_column, nv)
"""


def thresholded(value: str, tokens: str) -> str:
    """Statements that mark as ``dropped`` where ``|value| <= threshold``, unless ``[..., C]`` tokens are many.

    They read ``threshold`` and the attribute ``most_tokens``, and leave a ``zero`` of the value's type.
    """
    return f"""
    lead = Shape <start = 0, end = -1> ({tokens})
    count = ReduceProd <keepdims = 0> (lead)
    most = Constant <value_int: int = @most_tokens> ()
    few = LessOrEqual (count, most)
    magnitude = Abs ({value})
    magnitude32 = Cast <to = 1> (magnitude)
    small = LessOrEqual (magnitude32, threshold)
    dropped = And (small, few)
    zero32 = Constant <value = float {{0}}> ()
    zero = CastLike (zero32, {value})
"""
