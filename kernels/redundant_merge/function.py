"""``redundant_merge`` in standard ONNX operators.

As in ``bipartite_merge``, only the rows that change are computed, in an ``r x r`` same-target matrix, and
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
    name="RedundantMerge",
    torch_name="redundant_merge",
    inputs=SCORED_INPUTS,
    outputs=MERGED_OUTPUTS,
    shapes=MERGED_SHAPES,
    attributes={"protected": int},
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
    merging_row = Add (source_at, start)
    target_row = Add (target_at, start)

    # Unit metric, and the most similar target of each source; padding is never chosen.
"""
    + HEADS
    + """    depth = Shape <start = 3, end = 4> (metric)
    sum_shape = Concat <axis = 0> (last, depth)
    direction = Reshape (sum_flat, sum_shape)
"""
    + UNIT
    + """    unit_s = Gather (unit, merging_row)
    unit_t = Gather (unit, target_row)
    unit_tt = Transpose <perm = [0, 2, 1]> (unit_t)
    cosine = MatMul (unit_s, unit_tt)
    sizes = Reshape (size, last)
    s_target = Gather (sizes, target_row)
    void_t = Equal (s_target, zero)
    void_row = Unsqueeze (void_t, v1)
    similarity = Where (void_row, far, cosine)
    into = ArgMax <axis = -1, keepdims = 0> (similarity)

    rows = Flatten <axis = 2> (x)
    into_at = GatherElements <axis = 1> (target_at, into)
    into_row = Add (into_at, start)
"""
    + MERGED
    + """
    # What stays, in index order, and where: sources are the even ranks below 2 r.
    rank_key, rank = TopK <axis = 1, largest = 0> (order, mv)
    odd_bit = Mod (rank, i2)
    even = Equal (odd_bit, i0)
    early = Less (rank, two_r)
    goes = And (even, early)
    stays_pool = Not (goes)
"""
    + STAYING,
)
