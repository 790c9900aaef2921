"""Traces: OpenTelemetry spans of instrumented agents become items, and those of one trace meet in curation."""
