"""Whole blocks, or tokens of them, that leave a model."""
