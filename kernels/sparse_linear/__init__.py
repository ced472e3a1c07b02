"""A linear layer that skips the weights of small inputs."""
