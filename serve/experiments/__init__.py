"""Experiments: what is measured, how it is counted from the log, and what the numbers allow one to say."""
