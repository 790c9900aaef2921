"""The staged growth of a candidate's share: decided by a pure function, applied by a reconciler."""
