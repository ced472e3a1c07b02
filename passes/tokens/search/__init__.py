"""Searched schedules: strategies propose kept counts, an injected objective says what they are worth."""
