"""Keep tokens that lie far from each other (greedy max-min selection)."""
