"""Benchmarks: each module prints medians and the ratio against its named peer."""
