"""Feed-forward networks cut into experts, of which each token runs those that would add most."""
