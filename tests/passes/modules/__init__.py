"""Tests of token steps with learned weights."""
