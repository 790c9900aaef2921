"""Many trainings: search spaces and sweeps."""
