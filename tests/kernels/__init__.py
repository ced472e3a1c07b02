"""Tests of the operators: every face against an oracle of plain loops."""
