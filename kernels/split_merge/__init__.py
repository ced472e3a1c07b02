"""Merge tokens of low score into tokens of high score (ATM, with the size as the score)."""
