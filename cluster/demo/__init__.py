"""The demo: a simulated team of analysts and an alert-triage agent that learns from their reactions."""
