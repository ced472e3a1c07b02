"""What several operators that take tokens away have in common: signatures, and statements of their bodies."""

from __future__ import annotations

# Outputs of operators that merge, and their axes.
MERGED_OUTPUTS = {
    "y": "T",
    "out_size": "tensor(float)",
    "kept": "tensor(int64)",
    "slot": "tensor(int64)",
}
MERGED_SHAPES = {"y": "x0 keep x2", "out_size": "x0 keep", "kept": "x0 keep", "slot": "x0 x1"}
# Inputs of those that merge by a score.
SCORED_INPUTS = {
    "x": "T",
    "size": "tensor(float)",
    "metric": "T",
    "score": "tensor(float)",
    "keep": "tensor(int64)",
}

# Reads x, its token count nv, and the constants i0 = 0, i1 = 1, last = [-1].
ROWS = """
    # Rows of the flattened batch: item b starts at b n.
    bv = Shape <start = 0, end = 1> (x)
    b = Squeeze (bv)
    batch = Range (i0, b, i1)
    batch_column = Unsqueeze (batch, last)
    start = Mul (batch_column, nv)
"""

# Reads metric [B, H, N, d], v1 and last; leaves the sums over the heads as sum_flat [B, 1, N d].
HEADS = """
    # Unit metric; the sum over heads as a product with ones is faster than ReduceMean.  The ones
    # are a row: TensorRT squeezes the wrong axis of a product with a vector.
    heads = Shape <start = 1, end = 2> (metric)
    row = Concat <axis = 0> (v1, heads)
    ones = ConstantOfShape <value = float[1] {1.0}> (row)
    flat_shape = Constant <value = int64[3] {0, 0, -1}> ()
    metric32 = Cast <to = 1> (metric)
    metric_flat = Reshape (metric32, flat_shape)
    sum_flat = MatMul (ones, metric_flat)
"""

# Reads the rows direction and last; leaves them as unit vectors, a zero row as it is.
UNIT = """
    tiny = Constant <value = float {1e-12}> ()
    length = ReduceL2 (direction, last)
    length_safe = Max (length, tiny)
    unit = Div (direction, length_safe)
"""

# Reads x, its rows, sizes, and of each merging token its merging_row, and the target that it joins as
# into [B, r] and into_row; leaves merged [B, r, C], equal for equal targets, and the sizes added.
MERGED = """
    # Merged rows: weights first, in float32; the floor makes 0/0 keep the target.
    x_merging = Gather (rows, merging_row)
    x_into = Gather (rows, into_row)
    x_merging32 = Cast <to = 1> (x_merging)
    x_into32 = Cast <to = 1> (x_into)
    s_into = Gather (sizes, into_row)
    s_merging = Gather (sizes, merging_row)
    s_across = Unsqueeze (s_merging, v1)
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
    from_sources = MatMul (weights, x_merging32)
    from_target = Mul (weight_into, x_into32)
    merged32 = Add (from_sources, from_target)
    merged = CastLike (merged32, x)
"""

# Reads, of the tokens behind the prefix, which of them stay as stays_pool [B, M] and those that merge as
# source [B, r], into_at where they go, and what MERGED reads and leaves; p, n, kv, pv, bv, i0 and i1.
# Leaves the results in index order.
STAYING = """
    stays_int = Cast <to = 7> (stays_pool)
    running = CumSum (stays_int, i1)
    before = Sub (p, i1)
    position = Add (running, before)
    places = Range (p, n, i1)
    nowhere = Mul (stays_int, i0)
    place_pool = Add (nowhere, places)
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
"""

# Statements that make y of x, by the names of kernels/activations.py.
ACTIVATED = {
    "gelu": "{y} = Gelu ({x})",
    "gelu_tanh": '{y} = Gelu <approximate = "tanh"> ({x})',
    "identity": "{y} = Identity ({x})",
    "quick_gelu": "{y}_steep = Constant <value = float {{1.702}}> ()\n    {y}_typed = CastLike ({y}_steep, {x})\n"
    "    {y}_scaled = Mul ({x}, {y}_typed)\n    {y}_gate = Sigmoid ({y}_scaled)\n    {y} = Mul ({x}, {y}_gate)",
    "relu": "{y} = Relu ({x})",
    "silu": "{y}_gate = Sigmoid ({x})\n    {y} = Mul ({x}, {y}_gate)",
}


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
