"""Tests of learning how many tokens stay."""
