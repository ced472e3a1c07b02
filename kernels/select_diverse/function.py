"""``select_diverse`` in standard ONNX operators.

The picks are a loop, one round for each, over the matrix of similarities, whose diagonal keeps a
token from being picked twice.  In the first round tokens are ranked by their nearest neighbour.
"""

from __future__ import annotations

from thresher.kernels.body import ROWS
from thresher.kernels.operator import Operator

OPERATOR = Operator(
    name="SelectDiverse",
    torch_name="select_diverse",
    inputs={"x": "T", "size": "tensor(float)", "keep": "tensor(int64)"},
    outputs={"y": "T", "kept": "tensor(int64)", "slot": "tensor(int64)"},
    shapes={"y": "x0 keep x2", "kept": "x0 keep", "slot": "x0 x1"},
    attributes={"protected": int},
    body="""
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64 {1}> ()
    v0 = Constant <value = int64[1] {0}> ()
    v1 = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    p = Constant <value_int: int = @protected> ()
    pv = Reshape (p, v1)
    kv = Reshape (keep, v1)
    k = Squeeze (kv)
    nv = Shape <start = 1, end = 2> (x)
"""
    + ROWS
    + """
    # Similarity of all pairs behind the prefix.
    pool = Slice (x, pv, end, v1)
    pool32 = Cast <to = 1> (pool)
    tiny = Constant <value = float {1e-12}> ()
    length = ReduceL2 (pool32, last)
    length_safe = Max (length, tiny)
    unit = Div (pool32, length_safe)
    unit_t = Transpose <perm = [0, 2, 1]> (unit)
    # A product may round (i, j) and (j, i) apart, and two tokens then do not tie that are each other's nearest.
    product = MatMul (unit, unit_t)
    product_t = Transpose <perm = [0, 2, 1]> (product)
    cosine = Max (product, product_t)
    mv = Sub (nv, pv)
    m = Squeeze (mv)
    places = Range (i0, m, i1)
    place_column = Unsqueeze (places, last)
    itself = Equal (places, place_column)

    # Padding is nobody's neighbour and comes last.
    zero = Constant <value = float {0.0}> ()
    near = Constant <value = float {10000.0}> ()
    far = Constant <value = float {-10000.0}> ()
    chosen = Constant <value = float {20000.0}> ()
    pool_size = Slice (size, pv, end, v1)
    void = Equal (pool_size, zero)
    void_row = Unsqueeze (void, v1)
    nobody = Or (itself, void_row)
    others = Where (nobody, far, cosine)
    neighbour = ReduceMax <keepdims = 0> (others, last)
    nearest = Where (void, near, neighbour)
    closeness_last = Where (void_row, near, cosine)
    closeness = Where (itself, chosen, closeness_last)
    flat = Concat <axis = 0> (last, mv)
    closeness_rows = Reshape (closeness, flat)
    first_row = Mul (batch, m)
    unreached = Mul (nearest, zero)
    start_reached = Add (unreached, far)

    rounds = Sub (k, p)
    go = Constant <value = bool {1}> ()
    final_rank, final_reached, picks = Loop <body = round
        (int64 number, bool before, float[batch_, pool_] rank, float[batch_, pool_] reached)
        => (bool after, float[batch_, pool_] next_rank, float[batch_, pool_] next_reached,
            int64[batch_] pick)
        {
            after = Identity (before)
            pick = ArgMin <axis = -1, keepdims = 0> (rank)
            pick_row = Add (pick, first_row)
            seen = Gather (closeness_rows, pick_row)
            next_reached = Max (reached, seen)
            next_rank = Identity (next_reached)
        }> (rounds, go, nearest, start_reached)

    # In index order, behind the prefix.
    picks_t = Transpose <perm = [1, 0]> (picks)
    picked_v = Sub (kv, pv)
    sorted_picks, sorted_order = TopK <axis = 1, largest = 0> (picks_t, picked_v)
    behind = Add (sorted_picks, p)
    prefix = Range (i0, p, i1)
    prefix_shape = Concat <axis = 0> (bv, pv)
    prefix_rows = Expand (prefix, prefix_shape)
    kept = Concat <axis = 1> (prefix_rows, behind)
    kept_row = Add (kept, start)
    rows = Flatten <axis = 2> (x)
    y = Gather (rows, kept_row)

    # Map.
    slot_shape = Concat <axis = 0> (bv, nv)
    slot_flat = Mul (bv, nv)
    dropped_mark = Constant <value = int64[1] {-1}> ()
    dropped = Expand (dropped_mark, slot_flat)
    kept_rows = Reshape (kept_row, last)
    kept_places = Unsqueeze (kept_rows, last)
    stay = Range (i0, k, i1)
    kept_shape = Concat <axis = 0> (bv, kv)
    stay_rows = Expand (stay, kept_shape)
    stays = Reshape (stay_rows, last)
    marked = ScatterND (dropped, kept_places, stays)
    slot = Reshape (marked, slot_shape)
""",
)
