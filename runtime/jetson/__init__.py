"""Scripts that travel to a Jetson.  They are copied, never imported by thresher, and need no part of it."""
