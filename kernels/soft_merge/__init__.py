"""Weighted means of all tokens in place of the tokens (PatchMerger, SiT)."""
