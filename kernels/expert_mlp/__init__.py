"""A feed-forward network cut into experts, of which each token runs those that it chose."""
