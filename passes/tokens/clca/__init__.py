"""Cross-layer cache and aggregation: what a token reduction lost, brought back by a few learned weights."""
