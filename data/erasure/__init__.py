"""Erasure: a person leaves, and nothing of theirs stays in the log, in files or behind a version."""
