"""Engines: what turns messages into tokens, behind one OpenAI-compatible HTTP interface."""
