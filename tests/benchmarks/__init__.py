"""Benchmarks on trained models: scripts, run as ``python -m tests.benchmarks.NAME``."""
