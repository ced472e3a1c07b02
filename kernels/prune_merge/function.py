"""``prune_merge`` in standard ONNX operators.

As in ``bipartite_merge``, only the rows that change are computed: the joining tokens meet in a
matrix of those with the same target, one small MatMul yields the merged rows, and these overwrite
their places in the gathered output.  Rows with the same target are equal, so their order does not
matter and no reduction is needed.
"""

from __future__ import annotations

from thresher.kernels.body import MERGED_OUTPUTS, MERGED_SHAPES, ROWS
from thresher.kernels.operator import Operator

_RANKING = (
    """
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64 {1}> ()
    v0 = Constant <value = int64[1] {0}> ()
    v1 = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    zero = Constant <value = float {0.0}> ()
    one = Constant <value = float {1.0}> ()
    p = Constant <value_int: int = @protected> ()
    pv = Reshape (p, v1)
    kv = Reshape (keep, v1)
    cut = Reshape (pruned, v1)
    nv = Shape <start = 1, end = 2> (x)

    # One ranking of all positions: the prefix first, padding (size 0) last.
    least = Constant <value = float {-3.4028234e38}> ()
    most = Constant <value = float {3.4028234e38}> ()
    void = Equal (size, zero)
    worth = Where (void, least, score)
    rest = Slice (worth, pv, end, v1)
    pads = Concat <axis = 0> (v0, pv, v0, v0)
    guarded = Pad (rest, pads, most)
    values, order = TopK <axis = 1> (guarded, nv)
    chosen = Slice (order, v0, kv, v1)
    kept, kept_order = TopK <axis = 1, largest = 0> (chosen, kv)
    joining = Slice (order, kv, cut, v1)
"""
    + ROWS
    + """
    rows = Flatten <axis = 2> (x)
    sizes = Reshape (size, last)
    kept_row = Add (kept, start)
    joining_row = Add (joining, start)
    gathered = Gather (rows, kept_row)
    s_kept = Gather (sizes, kept_row)
    x_joining = Gather (rows, joining_row)
    s_joining = Gather (sizes, joining_row)
"""
)

_MATCHING = """
    # Best target of each joining token.  Where only the prefix stays, nothing joins, and its last
    # token stands in to keep the shapes legal.
    final = Sub (kv, v1)
    first = Min (pv, final)
    x_target = Slice (gathered, first, end, v1)
    s_target = Slice (s_kept, first, end, v1)
    tiny = Constant <value = float {1e-12}> ()
    x_target32 = Cast <to = 1> (x_target)
    target_length = ReduceL2 (x_target32, last)
    target_safe = Max (target_length, tiny)
    unit_target = Div (x_target32, target_safe)
    x_joining32 = Cast <to = 1> (x_joining)
    joining_length = ReduceL2 (x_joining32, last)
    joining_safe = Max (joining_length, tiny)
    unit_joining = Div (x_joining32, joining_safe)
    unit_across = Transpose <perm = [0, 2, 1]> (unit_target)
    cosine = MatMul (unit_joining, unit_across)
    far = Constant <value = float {-10000.0}> ()
    void_target = Equal (s_target, zero)
    void_across = Unsqueeze (void_target, v1)
    similarity = Where (void_across, far, cosine)
    best = ReduceMax <keepdims = 0> (similarity, last)
    into = ArgMax <axis = -1, keepdims = 0> (similarity)
    into_place = Add (into, first)
"""

_MERGING = """
    # Plain mean of the target and its real joining tokens, in float32; the sizes by cosine.
    into_column = Unsqueeze (into_place, last)
    into_across = Unsqueeze (into_place, v1)
    same = Equal (into_column, into_across)
    void_joining = Equal (s_joining, zero)
    present = Where (void_joining, zero, one)
    present_across = Unsqueeze (present, v1)
    parts = Where (same, present_across, zero)
    others = ReduceSum (parts, last)
    count = Add (others, one)
    weights = Div (parts, count)
    from_joining = MatMul (weights, x_joining32)
    into_row = GatherElements <axis = 1> (kept_row, into_place)
    x_into = Gather (rows, into_row)
    x_into32 = Cast <to = 1> (x_into)
    from_target = Div (x_into32, count)
    merged32 = Add (from_joining, from_target)
    merged = CastLike (merged32, x)
    scaled = Mul (best, s_joining)
    scaled_across = Unsqueeze (scaled, v1)
    scaled_parts = Where (same, scaled_across, zero)
    added = ReduceSum <keepdims = 0> (scaled_parts, last)
    s_into = Gather (sizes, into_row)
    sum = Add (s_into, added)
    floor = Min (s_into, one)
    total = Max (sum, floor)

    # Overwrite the targets' rows.
    batch_first = Unsqueeze (batch_column, last)
    place_shape = Shape (into_column)
    batch_at = Expand (batch_first, place_shape)
    places = Concat <axis = 2> (batch_at, into_column)
    y = ScatterND (gathered, places, merged)
    out_size = ScatterND (s_kept, places, total)
"""

_SLOT = """
    # Map: places in the order of the ranks, then in the order of the positions.
    sorted_order, staying_place = TopK <axis = 1, largest = 0> (kept_order, kv)
    ranked_place = Concat <axis = 1> (staying_place, into_place)
    rank_key, rank = TopK <axis = 1, largest = 0> (order, nv)
    last_rank = Sub (cut, v1)
    lasting = Min (rank, last_rank)
    place = GatherElements <axis = 1> (ranked_place, lasting)
    alive = Less (rank, cut)
    gone = Constant <value = int64 {-1}> ()
    slot = Where (alive, place, gone)
"""

OPERATOR = Operator(
    name="PruneMerge",
    torch_name="prune_merge",
    inputs={
        "x": "T",
        "size": "tensor(float)",
        "score": "tensor(float)",
        "pruned": "tensor(int64)",
        "keep": "tensor(int64)",
    },
    outputs=MERGED_OUTPUTS,
    shapes=MERGED_SHAPES,
    attributes={"protected": int},
    body=_RANKING + _MATCHING + _MERGING + _SLOT,
)
