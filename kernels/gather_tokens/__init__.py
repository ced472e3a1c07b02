"""Rows of each batch item by index."""
