"""The class token's row of the attention map, averaged over heads."""
