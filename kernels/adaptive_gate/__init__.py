"""How many learners a token runs: the largest of a few linear outputs."""
