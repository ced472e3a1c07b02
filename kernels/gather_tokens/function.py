"""ONNX form of ``thresher::gather_tokens``."""

BODY = """
GatherTokens <plugin_namespace, plugin_version> (x, index) => (y) {
  last = Constant <value_ints = [-1]> ()
  rows = Unsqueeze (index, last)
  y = GatherND <batch_dims = 1> (x, rows)
}
"""
