"""Tests of the passes apart from the model families: budgets and published schedules."""
