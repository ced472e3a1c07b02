"""A gated feed-forward layer that skips neurons whose gate is nearly shut."""
