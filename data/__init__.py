"""Events and what is made of them: the log, feedback, grading, curation, splits, manifests, erasure."""
