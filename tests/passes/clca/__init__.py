"""Tests of the cross-layer cache and the aggregation head."""
