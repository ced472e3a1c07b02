"""Merge the most similar tokens in pairs (ToMe)."""
