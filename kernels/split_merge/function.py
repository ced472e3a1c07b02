"""``split_merge`` in standard ONNX operators.

As in ``redundant_merge``, only the rows that change are computed, in an ``r x r`` same-target matrix, and
overwrite their places in the gathered output; rows with the same target are equal.
"""

from __future__ import annotations

from thresher.kernels.body import (
    HEADS,
    MERGED,
    MERGED_OUTPUTS,
    MERGED_SHAPES,
    ROWS,
    SCORED_INPUTS,
    STAYING,
    UNIT,
)
from thresher.kernels.operator import Operator

OPERATOR = Operator(
    name="SplitMerge",
    torch_name="split_merge",
    inputs=SCORED_INPUTS,
    outputs=MERGED_OUTPUTS,
    shapes=MERGED_SHAPES,
    attributes={"protected": int},
    body="""
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64 {1}> ()
    v0 = Constant <value = int64[1] {0}> ()
    v1 = Constant <value = int64[1] {1}> ()
    v2 = Constant <value = int64[1] {2}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    zero = Constant <value = float {0.0}> ()
    far = Constant <value = float {-10000.0}> ()
    most = Constant <value = float {10000.0}> ()
    lowest = Constant <value = float {-1e30}> ()
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
    # By rising score: the first half are sources, the rest targets.
    void = Equal (size, zero)
    guarded = Where (void, lowest, score)
    pool_score = Slice (guarded, pv, end, v1)
    ranked, order = TopK <axis = 1, largest = 0> (pool_score, mv)
    half = Div (mv, v2)
    lower = Slice (order, v0, half, v1)
    upper = Slice (order, half, end, v1)
    lower_at = Add (lower, p)
    target_at = Add (upper, p)
    lower_row = Add (lower_at, start)
    target_row = Add (target_at, start)

    # Unit metric, and the most similar target of each source; padding is never chosen.
"""
    + HEADS
    + """    depth = Shape <start = 3, end = 4> (metric)
    sum_shape = Concat <axis = 0> (last, depth)
    direction = Reshape (sum_flat, sum_shape)
"""
    + UNIT
    + """    unit_s = Gather (unit, lower_row)
    unit_t = Gather (unit, target_row)
    unit_tt = Transpose <perm = [0, 2, 1]> (unit_t)
    cosine = MatMul (unit_s, unit_tt)
    sizes = Reshape (size, last)
    s_target = Gather (sizes, target_row)
    void_t = Equal (s_target, zero)
    void_row = Unsqueeze (void_t, v1)
    similarity = Where (void_row, far, cosine)
    best = ReduceMax <keepdims = 0> (similarity, last)
    nearest = ArgMax <axis = -1, keepdims = 0> (similarity)

    # The r best pairs, padding first.
    s_lower = Gather (sizes, lower_row)
    void_s = Equal (s_lower, zero)
    likeness = Where (void_s, most, best)
    top, ranking = TopK <axis = 1> (likeness, half)
    merging = Slice (ranking, v0, r, v1)
    source = GatherElements <axis = 1> (lower, merging)
    into = GatherElements <axis = 1> (nearest, merging)
    source_at = Add (source, p)
    merging_row = Add (source_at, start)
    into_at = GatherElements <axis = 1> (target_at, into)
    into_row = Add (into_at, start)
    rows = Flatten <axis = 2> (x)
"""
    + MERGED
    + """
    # What stays, in index order, and where.
    none = Mul (order, i0)
    goes_at = Unsqueeze (source, last)
    goes_batch = Mul (goes_at, i0)
    own_batch = Unsqueeze (batch_column, last)
    goes_row = Add (goes_batch, own_batch)
    goes_places = Concat <axis = 2> (goes_row, goes_at)
    mark = Squeeze (goes_batch, last)
    one = Add (mark, i1)
    goes = ScatterND (none, goes_places, one)
    stays_pool = Equal (goes, i0)
"""
    + STAYING,
)
