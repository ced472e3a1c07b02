"""Attention that one query row pays to every key, averaged over heads."""
