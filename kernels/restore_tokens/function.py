"""ONNX form of ``thresher::restore_tokens``."""

BODY = """
RestoreTokens <plugin_namespace, plugin_version> (x, slot, aside) => (y) {
  last = Constant <value_ints = [-1]> ()
  zero = Constant <value_int = 0> ()
  here = GreaterOrEqual (slot, zero)
  safe = Max (slot, zero)
  rows = Unsqueeze (safe, last)
  found = GatherND <batch_dims = 1> (x, rows)
  choose = Unsqueeze (here, last)
  y = Where (choose, found, aside)
}
"""
