"""Bipartite soft matching and size-weighted merging of tokens (ToMe)."""
