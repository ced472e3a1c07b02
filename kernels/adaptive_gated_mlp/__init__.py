"""A feed-forward network that runs as many of its parts as each token needs."""
