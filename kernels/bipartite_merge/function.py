"""``bipartite_merge`` in standard ONNX operators.

Only the rows that change are computed: the ``r`` merging sources meet their targets in an ``r x r``
same-target matrix, one small MatMul yields the merged rows, and these overwrite their places in the
gathered output.  Rows with the same target are equal, so their order does not matter and no
reduction is needed.  The tokens are read and written once.
"""

from __future__ import annotations

from thresher.kernels.operator import Operator

_POSITIONS = """
    # Positions: sources s0, s0 + 2, ...; targets d0, d0 + 2, ...; tables are columns [., 1].
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64 {1}> ()
    i2 = Constant <value = int64 {2}> ()
    v0 = Constant <value = int64[1] {0}> ()
    v1 = Constant <value = int64[1] {1}> ()
    v2 = Constant <value = int64[1] {2}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    zero = Constant <value = float {0.0}> ()
    p = Constant <value_int: int = @protected> ()
    pv = Reshape (p, v1)
    odd = Mod (p, i2)
    even = Sub (i1, odd)
    s0 = Add (p, odd)
    d0 = Add (p, even)
    s0v = Reshape (s0, v1)
    d0v = Reshape (d0, v1)
    nv = Shape <start = 1, end = 2> (x)
    n = Squeeze (nv)
    kv = Reshape (keep, v1)
    r = Sub (nv, kv)
    sources = Range (s0, n, i2)
    targets = Range (d0, n, i2)
    prefix = Range (i0, p, i1)
    source_table = Unsqueeze (sources, last)
    target_table = Unsqueeze (targets, last)
    prefix_table = Unsqueeze (prefix, last)
"""

_MATCHING = """
    # Unit metric; the sum over heads as a product with ones is faster than ReduceMean.
    heads = Shape <start = 1, end = 2> (metric)
    ones = ConstantOfShape <value = float[1] {1.0}> (heads)
    flat_shape = Constant <value = int64[3] {0, 0, -1}> ()
    metric32 = Cast <to = 1> (metric)
    metric_flat = Reshape (metric32, flat_shape)
    sum_flat = MatMul (ones, metric_flat)
    sum_shape = Concat <axis = 0> (v0, nv, last)
    direction = Reshape (sum_flat, sum_shape)
    tiny = Constant <value = float {1e-12}> ()
    length = ReduceL2 (direction, last)
    length_safe = Max (length, tiny)
    unit = Div (direction, length_safe)

    # Best target of each source; padding (size 0) is never chosen and merges first.
    unit_s = Slice (unit, s0v, end, v1, v2)
    unit_t = Slice (unit, d0v, end, v1, v2)
    unit_tt = Transpose <perm = [0, 2, 1]> (unit_t)
    cosine = MatMul (unit_s, unit_tt)
    far = Constant <value = float {-10000.0}> ()
    void = Equal (size, zero)
    penalty = Where (void, far, zero)
    void_s = Slice (void, s0v, end, v1, v2)
    soon = Constant <value = float {10000.0}> ()
    penalty_t = Slice (penalty, d0v, end, v1, v2)
    penalty_row = Unsqueeze (penalty_t, v1)
    similarity = Add (cosine, penalty_row)
    best = ReduceMax <keepdims = 0> (similarity, last)
    choice = ArgMax <axis = -1, keepdims = 0> (similarity)
    rank = Where (void_s, soon, best)
    ns = Shape (sources)
    ranked, order = TopK <axis = 1> (rank, ns)
    merging = Slice (order, v0, r, v1)
    staying_ranked = Slice (order, r, end, v1)
    into = GatherElements <axis = 1> (choice, merging)

    # Staying sources in index order, or (all keys zero, ties to the lower index) as ranked.
    nstay = Sub (ns, r)
    by = Constant <value_int: int = @by_index> ()
    key = Mul (staying_ranked, by)
    key_sorted, permutation = TopK <axis = 1, largest = 0> (key, nstay)
    staying = GatherElements <axis = 1> (staying_ranked, permutation)
"""

_MERGING = """
    # Gather every row that leaves; the batch's coordinates also spread the tables over the batch.
    merging_at = Gather (source_table, merging)
    staying_at = Gather (source_table, staying)
    into_at = Gather (target_table, into)
    bv = Shape <start = 0, end = 1> (x)
    b = Squeeze (bv)
    batch = Range (i0, b, i1)
    v12 = Constant <value = int64[2] {1, 2}> ()
    batch_column = Unsqueeze (batch, v12)
    nothing = Mul (batch_column, i0)
    prefix_at = Add (prefix_table, nothing)
    target_at = Add (target_table, nothing)
    kept_at = Concat <axis = 1> (prefix_at, staying_at, target_at)
    gathered = GatherND <batch_dims = 1> (x, kept_at)

    # Merged rows: weights first, in float32; the floor makes 0/0 keep the target.
    x_merging = GatherND <batch_dims = 1> (x, merging_at)
    x_into = GatherND <batch_dims = 1> (x, into_at)
    x_merging32 = Cast <to = 1> (x_merging)
    x_into32 = Cast <to = 1> (x_into)
    size_column = Unsqueeze (size, last)
    s_into = GatherND <batch_dims = 1> (size_column, into_at)
    s_merging = GatherND <batch_dims = 1> (size, merging_at)
    s_row = Unsqueeze (s_merging, v1)
    into_row = Transpose <perm = [0, 2, 1]> (into_at)
    same = Equal (into_at, into_row)
    parts = Where (same, s_row, zero)
    added = ReduceSum (parts, last)
    floor = Constant <value = float {1e-37}> ()
    s_safe = Max (s_into, floor)
    total_safe = Add (added, s_safe)
    weights = Div (parts, total_safe)
    weight_into = Div (s_safe, total_safe)
    from_sources = MatMul (weights, x_merging32)
    from_target = Mul (weight_into, x_into32)
    merged32 = Add (from_sources, from_target)
    merged = CastLike (merged32, x)

    # Overwrite the targets' rows at [b, protected + staying + target].
    offset = Add (pv, nstay)
    into_column = Unsqueeze (into, last)
    place = Add (into_column, offset)
    place_shape = Shape (place)
    batch_at = Expand (batch_column, place_shape)
    places = Concat <axis = 2> (batch_at, place)
    y = ScatterND (gathered, places, merged)
    total = Add (added, s_into)
    size_gathered = GatherND <batch_dims = 1> (size_column, kept_at)
    size_scattered = ScatterND (size_gathered, places, total)
    out_size = Squeeze (size_scattered, last)
"""

_MAPS = """
    # Maps.
    kept = Squeeze (kept_at, last)
    place_flat = Squeeze (place, last)
    moved, back = TopK <axis = 1, largest = 0> (permutation, nstay)
    staying_place = Add (back, pv)
    ranked_place = Concat <axis = 1> (place_flat, staying_place)
    unranked_key, unranked = TopK <axis = 1, largest = 0> (order, ns)
    source_place = GatherElements <axis = 1> (ranked_place, unranked)
    prefix_flat = Squeeze (prefix_at, last)
    target_index = Sub (target_at, d0)
    target_half = Div (target_index, i2)
    target_column = Add (target_half, offset)
    target_place = Squeeze (target_column, last)
    grouped = Concat <axis = 1> (prefix_flat, source_place, target_place)
    groups = Concat <axis = 0> (prefix, sources, targets)
    group_key, ungroup = TopK <axis = 0, largest = 0> (groups, nv)
    slot = Gather <axis = 1> (grouped, ungroup)
"""

OPERATOR = Operator(
    name="BipartiteMerge",
    torch_name="bipartite_merge",
    inputs={"x": "T", "size": "tensor(float)", "metric": "T", "keep": "tensor(int64)"},
    outputs={"y": "T", "out_size": "tensor(float)", "kept": "tensor(int64)", "slot": "tensor(int64)"},
    attributes={"protected": int, "by_index": int},
    body=_POSITIONS + _MATCHING + _MERGING + _MAPS,
)
