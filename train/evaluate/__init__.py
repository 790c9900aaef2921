"""What a version must pass before any traffic reaches it."""
