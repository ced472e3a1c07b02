"""Activation sparsity."""
