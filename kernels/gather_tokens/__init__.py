"""Pick tokens by a position per sample."""
