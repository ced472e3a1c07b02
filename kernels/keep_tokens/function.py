"""ONNX forms of ``thresher::keep_tokens``: dropping the rest (KeepTokens) or fusing it (FuseTokens)."""

_CONSTANTS = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  last = Constant <value_ints = [-1]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  start0 = Constant <value_int: int = @protected> ()
  start = Reshape (start0, one)
  wanted = Reshape (keep, one)
  ranked = Slice (score, start, end, one)
  batch = Shape <start = 0, end = 1> (x)
  origin = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  prefix0 = Range (origin, start0, step)
  prefixshape = Concat <axis = 0> (batch, start)
  prefix = Expand (prefix0, prefixshape)
"""

_SLOT = """
  tokens = Shape <start = 1, end = 2> (x)
  everywhere = Concat <axis = 0> (batch, tokens)
  gone = Expand (last, everywhere)
  placed = Shape <start = 1, end = 2> (stay)
  placed0 = Squeeze (placed)
  places0 = Range (origin, placed0, step)
  stayshape = Shape (stay)
  places = Expand (places0, stayshape)
  slot = ScatterElements <axis = 1> (gone, stay, places)
"""

BODY = f"""
KeepTokens <protected, plugin_namespace, plugin_version> (x, score, keep) => (y, slot, kept) {{
{_CONSTANTS}
  chosen = Sub (wanted, start)
  value, best = TopK <axis = 1> (ranked, chosen)
  index, order = TopK <axis = 1, largest = 0> (best, chosen)
  behind = Add (index, start)
  stay = Concat <axis = 1> (prefix, behind)
  kept = Identity (stay)
  rows = Unsqueeze (stay, last)
  y = GatherND <batch_dims = 1> (x, rows)
{_SLOT}
}}
"""

FUSE_BODY = f"""
FuseTokens <protected, plugin_namespace, plugin_version> (x, score, keep) => (y, slot, kept) {{
{_CONSTANTS}
  most = Shape <start = 1, end = 2> (ranked)
  less = Sub (wanted, start)
  chosen = Sub (less, one)
  value, ranking = TopK <axis = 1> (ranked, most)
  best = Slice (ranking, zero, chosen, one)
  dropped = Slice (ranking, chosen, end, one)
  index, order = TopK <axis = 1, largest = 0> (best, chosen)
  behind = Add (index, start)
  stay = Concat <axis = 1> (prefix, behind)
  rest = Add (dropped, start)
  leader = Slice (rest, zero, one, one)
  kept = Concat <axis = 1> (stay, leader)
  rows = Unsqueeze (stay, last)
  y0 = GatherND <batch_dims = 1> (x, rows)
  restrows = Unsqueeze (rest, last)
  restx = GatherND <batch_dims = 1> (x, restrows)
  weight0 = GatherElements <axis = 1> (score, rest)
  weight1 = Unsqueeze (weight0, one)
  weight = CastLike (weight1, x)
  fused = MatMul (weight, restx)
  y = Concat <axis = 1> (y0, fused)
{_SLOT}
}}
"""
