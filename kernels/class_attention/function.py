"""ONNX forms of ``thresher::class_attention``: without and with an additive bias.

The keys are multiplied from the left, ``k q^T``, so that they need no transposition.
"""

_ROW = """
  axis = Constant <value_ints = [2]> ()
  one = Constant <value_ints = [1]> ()
  row0 = Constant <value_int: int = @row> ()
  first = Reshape (row0, one)
  past = Add (first, one)
"""

_LOGITS = """
  query = Slice (q, first, past, axis)
  query32 = Cast <to = 1> (query)
  factor = Constant <value_float: float = @scale> ()
  scaled = Mul (query32, factor)
  column = Transpose <perm = [0, 1, 3, 2]> (scaled)
  k32 = Cast <to = 1> (k)
  logits = MatMul (k32, column)
"""

_MEAN = """
  heads = ReduceMean <keepdims = 0> (weight, one)
  last = Constant <value_ints = [-1]> ()
  score = Squeeze (heads, last)
"""

BODY = f"""
ClassAttention <scale, row, plugin_namespace, plugin_version> (q, k) => (score) {{
{_ROW}{_LOGITS}
  weight = Softmax <axis = 2> (logits)
{_MEAN}
}}
"""

BIASED_BODY = f"""
BiasedClassAttention <scale, row, plugin_namespace, plugin_version> (q, k, bias) => (score) {{
{_ROW}{_LOGITS}
  lines = Shape <start = 2, end = 3> (bias)
  lastline = Sub (lines, one)
  from = Min (first, lastline)
  to = Add (from, one)
  line = Slice (bias, from, to, axis)
  line32 = Cast <to = 1> (line)
  across = Transpose <perm = [0, 1, 3, 2]> (line32)
  biased = Add (logits, across)
  weight = Softmax <axis = 2> (biased)
{_MEAN}
}}
"""
