"""``bipartite_merge`` in standard ONNX operators.

Only the rows that change are computed: the ``r`` merging sources meet their targets in an ``r x r``
same-target matrix, one small MatMul yields the merged rows, and these overwrite their places in the
gathered output.  Rows with the same target are equal, so their order does not matter and no
reduction is needed.  The tokens are read and written once.

Two operators: in ``BipartiteMerge`` the staying sources leave in index order, in
``RankedBipartiteMerge`` by falling similarity.
"""

from __future__ import annotations

from thresher.kernels.body import HEADS, MERGED, MERGED_OUTPUTS, MERGED_SHAPES, ROWS, UNIT
from thresher.kernels.operator import Operator

_POSITIONS = (
    """
    # Positions: sources s0, s0 + 2, ...; targets d0, d0 + 2, ....
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
    prefix = Range (i0, p, i1)
    everything = Range (i0, n, i1)
    sources = Slice (everything, s0v, end, v0, v2)
    targets = Slice (everything, d0v, end, v0, v2)
"""
    + ROWS
)

_MATCHING = (
    HEADS
    + """    sum_shape = Concat <axis = 0> (v0, nv, last)
    direction = Reshape (sum_flat, sum_shape)
"""
    + UNIT
    + """
    # Best target of each source; padding (size 0) is never chosen and merges first.  Where there is
    # no target, nothing merges, and the last token stands in to keep the shapes legal.
    unit_s = Slice (unit, s0v, end, v1, v2)
    final = Sub (nv, v1)
    first_t = Min (d0v, final)
    unit_t = Slice (unit, first_t, end, v1, v2)
    unit_tt = Transpose <perm = [0, 2, 1]> (unit_t)
    cosine = MatMul (unit_s, unit_tt)
    far = Constant <value = float {-10000.0}> ()
    void = Equal (size, zero)
    void_s = Slice (void, s0v, end, v1, v2)
    soon = Constant <value = float {10000.0}> ()
    limit = Where (void, far, soon)
    limit_t = Slice (limit, first_t, end, v1, v2)
    limit_row = Unsqueeze (limit_t, v1)
    similarity = Min (cosine, limit_row)
    best = ReduceMax <keepdims = 0> (similarity, last)
    choice = ArgMax <axis = -1, keepdims = 0> (similarity)
    rank = Where (void_s, soon, best)
    ns = Shape (sources)
    ranked, order = TopK <axis = 1> (rank, ns)
    merging = Slice (order, v0, r, v1)
    into = GatherElements <axis = 1> (choice, merging)

    # Rows of the merging and the staying sources.
    order_at = Gather (sources, order)
    order_row = Add (order_at, start)
    merging_row = Slice (order_row, v0, r, v1)
    ranked_row = Slice (order_row, r, end, v1)
    nstay = Sub (ns, r)
"""
)

_BY_INDEX = """
    staying_row, permutation = TopK <axis = 1, largest = 0> (ranked_row, nstay)
"""

_BY_RANK = """
    staying_row = Identity (ranked_row)
"""

_MERGING = (
    """
    # Gather every row that leaves.
    into_at = Gather (targets, into)
    into_row = Add (into_at, start)
    prefix_row = Add (prefix, start)
    target_row = Add (targets, start)
    kept_row = Concat <axis = 1> (prefix_row, staying_row, target_row)
    rows = Flatten <axis = 2> (x)
    gathered = Gather (rows, kept_row)

    sizes = Reshape (size, last)
"""
    + MERGED
    + """
    # Overwrite the targets' rows at [b, protected + staying + target].
    offset = Add (pv, nstay)
    place = Add (into_column, offset)
    batch_first = Unsqueeze (batch_column, last)
    place_shape = Shape (place)
    batch_at = Expand (batch_first, place_shape)
    places = Concat <axis = 2> (batch_at, place)
    y = ScatterND (gathered, places, merged)
    total = Add (added, s_into)
    size_gathered = Gather (sizes, kept_row)
    out_size = ScatterND (size_gathered, places, total)
"""
)

_PLACE_BY_INDEX = """
    # Maps; where the staying sources live, in the order of their ranks.
    moved, back = TopK <axis = 1, largest = 0> (permutation, nstay)
    staying_place = Add (back, pv)
"""

_PLACE_BY_RANK = """
    # Maps; where the staying sources live, in the order of their ranks.
    stays = Squeeze (nstay)
    count = Range (i0, stays, i1)
    counted = Add (count, pv)
    no_row = Mul (start, i0)
    staying_place = Add (counted, no_row)
"""

_MAPS = """
    kept = Sub (kept_row, start)
    place_flat = Squeeze (place, last)
    ranked_place = Concat <axis = 1> (place_flat, staying_place)
    unranked_key, unranked = TopK <axis = 1, largest = 0> (order, ns)
    source_place = GatherElements <axis = 1> (ranked_place, unranked)
    prefix_place = Sub (prefix_row, start)
    target_at = Sub (target_row, start)
    target_odd = Sub (target_at, d0)
    target_index = Div (target_odd, i2)
    target_place = Add (target_index, offset)
    grouped = Concat <axis = 1> (prefix_place, source_place, target_place)
    groups = Concat <axis = 0> (prefix, sources, targets)
    group_key, ungroup = TopK <axis = 0, largest = 0> (groups, nv)
    slot = Gather <axis = 1> (grouped, ungroup)
"""


def _operator(name: str, staying: str, place: str) -> Operator:
    return Operator(
        name=name,
        torch_name="bipartite_merge",
        inputs={"x": "T", "size": "tensor(float)", "metric": "T", "keep": "tensor(int64)"},
        outputs=MERGED_OUTPUTS,
        shapes=MERGED_SHAPES,
        attributes={"protected": int},
        body=_POSITIONS + _MATCHING + staying + _MERGING + place + _MAPS,
    )


BY_INDEX = _operator("BipartiteMerge", _BY_INDEX, _PLACE_BY_INDEX)
BY_RANK = _operator("RankedBipartiteMerge", _BY_RANK, _PLACE_BY_RANK)
