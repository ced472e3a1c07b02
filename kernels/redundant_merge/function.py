"""``redundant_merge`` in standard ONNX operators.

As in ``bipartite_merge``, only the rows that change are computed, in an ``r x r`` same-target matrix, and
overwrite their places in the gathered output; rows with the same target are equal.
"""

from __future__ import annotations

from thresher.kernels.body import ROWS
from thresher.kernels.operator import Operator

OPERATOR = Operator(
    name="RedundantMerge",
    torch_name="redundant_merge",
    inputs={
        "x": "T",
        "size": "tensor(float)",
        "metric": "T",
        "score": "tensor(float)",
        "keep": "tensor(int64)",
    },
    outputs={
        "y": "T",
        "out_size": "tensor(float)",
        "kept": "tensor(int64)",
        "slot": "tensor(int64)",
    },
    shapes={"y": "x0 keep x2", "out_size": "x0 keep", "kept": "x0 keep", "slot": "x0 x1"},
    attributes={"protected": int},
    gpu=False,
    body="""
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64 {1}> ()
    i2 = Constant <value = int64 {2}> ()
    v0 = Constant <value = int64[1] {0}> ()
    v1 = Constant <value = int64[1] {1}> ()
    v2 = Constant <value = int64[1] {2}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    zero = Constant <value = float {0.0}> ()
    far = Constant <value = float {-10000.0}> ()
    most = Constant <value = float {10000.0}> ()
    p = Constant <value_int: int = @protected> ()
    pv = Reshape (p, v1)
    kv = Reshape (keep, v1)
    nv = Shape <start = 1, end = 2> (x)
    n = Squeeze (nv)
    mv = Sub (nv, pv)
    r = Sub (nv, kv)
"""
    + ROWS
    + """
    # The 2 r of highest score, sources and targets in turn.  Where nothing merges, a target stands
    # in to keep the shapes legal.
    void = Equal (size, zero)
    guarded = Where (void, most, score)
    pool_score = Slice (guarded, pv, end, v1)
    ranked, order = TopK <axis = 1> (pool_score, mv)
    two_r = Mul (r, v2)
    source = Slice (order, v0, two_r, v1, v2)
    final = Sub (mv, v1)
    first_t = Min (v1, final)
    some = Max (two_r, v2)
    target = Slice (order, first_t, some, v1, v2)
    source_at = Add (source, p)
    target_at = Add (target, p)
    source_row = Add (source_at, start)
    target_row = Add (target_at, start)

    # Unit metric, and the most similar target of each source; padding is never chosen.
    heads = Shape <start = 1, end = 2> (metric)
    row = Concat <axis = 0> (v1, heads)
    ones = ConstantOfShape <value = float[1] {1.0}> (row)
    flat_shape = Constant <value = int64[3] {0, 0, -1}> ()
    metric32 = Cast <to = 1> (metric)
    metric_flat = Reshape (metric32, flat_shape)
    sum_flat = MatMul (ones, metric_flat)
    depth = Shape <start = 3, end = 4> (metric)
    sum_shape = Concat <axis = 0> (last, depth)
    direction = Reshape (sum_flat, sum_shape)
    tiny = Constant <value = float {1e-12}> ()
    length = ReduceL2 (direction, last)
    length_safe = Max (length, tiny)
    unit = Div (direction, length_safe)
    unit_s = Gather (unit, source_row)
    unit_t = Gather (unit, target_row)
    unit_tt = Transpose <perm = [0, 2, 1]> (unit_t)
    cosine = MatMul (unit_s, unit_tt)
    sizes = Reshape (size, last)
    s_target = Gather (sizes, target_row)
    void_t = Equal (s_target, zero)
    void_row = Unsqueeze (void_t, v1)
    similarity = Where (void_row, far, cosine)
    into = ArgMax <axis = -1, keepdims = 0> (similarity)

    # Merged rows: weights first, in float32; the floor makes 0/0 keep the target.
    rows = Flatten <axis = 2> (x)
    into_at = GatherElements <axis = 1> (target_at, into)
    into_row = Add (into_at, start)
    x_source = Gather (rows, source_row)
    x_into = Gather (rows, into_row)
    x_source32 = Cast <to = 1> (x_source)
    x_into32 = Cast <to = 1> (x_into)
    s_source = Gather (sizes, source_row)
    s_into = Gather (sizes, into_row)
    s_across = Unsqueeze (s_source, v1)
    into_column = Unsqueeze (into, last)
    into_across = Unsqueeze (into, v1)
    same = Equal (into_column, into_across)
    parts = Where (same, s_across, zero)
    added = ReduceSum <keepdims = 0> (parts, last)
    floor = Constant <value = float {1e-37}> ()
    s_safe = Max (s_into, floor)
    total_safe = Add (added, s_safe)
    total_column = Unsqueeze (total_safe, last)
    weights = Div (parts, total_column)
    s_column = Unsqueeze (s_safe, last)
    weight_into = Div (s_column, total_column)
    from_sources = MatMul (weights, x_source32)
    from_target = Mul (weight_into, x_into32)
    merged32 = Add (from_sources, from_target)
    merged = CastLike (merged32, x)

    # What stays, in index order, and where: sources are the even ranks below 2 r.
    rank_key, rank = TopK <axis = 1, largest = 0> (order, mv)
    odd_bit = Mod (rank, i2)
    even = Equal (odd_bit, i0)
    early = Less (rank, two_r)
    goes = And (even, early)
    stays_pool = Not (goes)
    stays_int = Cast <to = 7> (stays_pool)
    running = CumSum (stays_int, i1)
    before = Sub (p, i1)
    position = Add (running, before)
    places = Range (p, n, i1)
    later = Mul (rank, i0)
    place_pool = Add (later, places)
    moved = Add (place_pool, n)
    sorting = Where (stays_pool, place_pool, moved)
    behind_count = Sub (kv, pv)
    behind, behind_order = TopK <axis = 1, largest = 0> (sorting, behind_count)
    prefix = Range (i0, p, i1)
    prefix_shape = Concat <axis = 0> (bv, pv)
    prefix_rows = Expand (prefix, prefix_shape)
    kept = Concat <axis = 1> (prefix_rows, behind)
    kept_row = Add (kept, start)

    # Overwrite the targets' rows.
    into_pool = Sub (into_at, p)
    into_place = GatherElements <axis = 1> (position, into_pool)
    place_column = Unsqueeze (into_place, last)
    batch_first = Unsqueeze (batch_column, last)
    place_shape = Shape (place_column)
    batch_at = Expand (batch_first, place_shape)
    overwritten = Concat <axis = 2> (batch_at, place_column)
    gathered = Gather (rows, kept_row)
    y = ScatterND (gathered, overwritten, merged)
    total = Add (added, s_into)
    size_gathered = Gather (sizes, kept_row)
    out_size = ScatterND (size_gathered, overwritten, total)

    # Map: sources live where their targets do.
    source_column = Unsqueeze (source, last)
    source_places = Concat <axis = 2> (batch_at, source_column)
    slot_pool = ScatterND (position, source_places, into_place)
    slot = Concat <axis = 1> (prefix_rows, slot_pool)
""",
)
