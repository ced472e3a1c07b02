"""A linear that skips the inputs that are too small to matter, where there are few tokens."""
