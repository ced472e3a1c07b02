"""Learning how many tokens stay at each site, with the model itself frozen (DiffRate)."""
