"""Top-k by score in index order, with an optional fused token."""
