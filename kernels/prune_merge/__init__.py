"""Prune the lowest-ranked tokens, merge the next ones into those that stay."""
