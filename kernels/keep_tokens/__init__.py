"""Keep the best-scored tokens; drop the rest or fuse it into one."""
