"""``keep_tokens`` in standard ONNX operators: ``KeepTokens`` drops the rest, ``FuseTokens`` fuses it.

The prefix gets the largest score there is, so that one ranking and one sort yield all positions.
"""

from __future__ import annotations

from thresher.kernels.body import ROWS
from thresher.kernels.operator import Operator

_RANKING = (
    """
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64 {1}> ()
    v0 = Constant <value = int64[1] {0}> ()
    v1 = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    p = Constant <value_int: int = @protected> ()
    pv = Reshape (p, v1)
    kv = Reshape (keep, v1)
    nv = Shape <start = 1, end = 2> (x)
    most = Constant <value = float {3.4028234e38}> ()
    rest = Slice (score, pv, end, v1)
    pads = Concat <axis = 0> (v0, pv, v0, v0)
    guarded = Pad (rest, pads, most)
    values, order = TopK <axis = 1> (guarded, nv)
"""
    + ROWS
    + """
    rows = Flatten <axis = 2> (x)
"""
)

_SLOT = """
    # Map.
    rank_key, rank = TopK <axis = 1, largest = 0> (order, nv)
    stays = Less (rank, count)
    stays_int = Cast <to = 7> (stays)
    running = CumSum (stays_int, i1)
    position = Sub (running, i1)
    dropped_mark = Constant <value = int64 {-1}> ()
    slot = Where (stays, position, dropped_mark)
"""

KEEP = Operator(
    name="KeepTokens",
    torch_name="keep_tokens",
    inputs={"x": "T", "score": "tensor(float)", "keep": "tensor(int64)"},
    outputs={"y": "T", "kept": "tensor(int64)", "slot": "tensor(int64)"},
    shapes={"y": "x0 keep x2", "kept": "x0 keep", "slot": "x0 x1"},
    attributes={"protected": int},
    body=_RANKING
    + """
    count = Identity (kv)
    chosen = Slice (order, v0, count, v1)
    kept, kept_order = TopK <axis = 1, largest = 0> (chosen, kv)
    kept_row = Add (kept, start)
    y = Gather (rows, kept_row)
"""
    + _SLOT,
)

FUSE = Operator(
    name="FuseTokens",
    torch_name="keep_tokens",
    inputs={"x": "T", "score": "tensor(float)", "keep": "tensor(int64)"},
    outputs={"y": "T", "kept": "tensor(int64)", "slot": "tensor(int64)"},
    shapes={"y": "x0 keep x2", "kept": "x0 keep", "slot": "x0 x1"},
    attributes={"protected": int},
    body=_RANKING
    + """
    count = Sub (kv, v1)
    chosen = Slice (order, v0, count, v1)
    dropped = Slice (order, count, end, v1)
    staying, staying_order = TopK <axis = 1, largest = 0> (chosen, count)
    stand_in = Slice (dropped, v0, v1, v1)
    kept = Concat <axis = 1> (staying, stand_in)
    kept_row = Add (kept, start)
    gathered = Gather (rows, kept_row)

    # The fused row overwrites its stand-in at [b, K - 1].
    weights = Slice (values, count, end, v1)
    weights_row = Unsqueeze (weights, v1)
    dropped_row = Add (dropped, start)
    x_dropped = Gather (rows, dropped_row)
    x_dropped32 = Cast <to = 1> (x_dropped)
    fused32 = MatMul (weights_row, x_dropped32)
    fused = CastLike (fused32, x)
    first = Constant <value = int64[2] {1, 0}> ()
    second = Constant <value = int64[2] {0, 1}> ()
    batch_first = Unsqueeze (batch_column, last)
    batch_pair = Mul (batch_first, first)
    place_pair = Mul (count, second)
    places = Add (batch_pair, place_pair)
    y = ScatterND (gathered, places, fused)
"""
    + _SLOT,
)
