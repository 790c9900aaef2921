"""Outlets: events leave the log for webhooks, brokers and people, each behind a cursor of its own."""
