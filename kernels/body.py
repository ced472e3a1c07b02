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
