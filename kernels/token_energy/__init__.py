"""How much a token is like all the others (PiToMe's energy)."""
