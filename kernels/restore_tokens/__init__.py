"""Reduced tokens back in their places, dropped ones from aside."""
