"""Tests of the passes over depth."""
