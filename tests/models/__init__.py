"""Sources, weights, data and preprocessing."""
