"""Neurons and channels that contribute nothing: found by calibration, left out of the graph."""
