"""Tests of the adaptive computation modules."""
