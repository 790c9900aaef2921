"""Serve applications of candidates with another base model (architecture.md): brought up and taken down by a driver."""
