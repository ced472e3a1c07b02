"""Merge the tokens of highest score among themselves (PiToMe)."""
