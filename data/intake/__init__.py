"""Intake: what comes from outside becomes events, or is refused with the reason."""
