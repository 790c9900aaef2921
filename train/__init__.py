"""From a dataset to an evaluated, registered version."""
