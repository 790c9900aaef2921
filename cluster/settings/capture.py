"""Event intake, feedback rewards and retention (capture.md)."""

from pydantic import Field

from cluster.settings.base import Section


class LogSettings(Section):
    """The event log."""

    group_commit_events: int = Field(256, ge=1)
    """A group commit is written when this many events wait."""
    group_commit_ms: float = Field(2.0, ge=0)
    """…or when the oldest waiting event is this old."""
    group_commit_max_events: int = Field(4096, ge=1)
    """Events in one transaction at most, when they come faster than they are written."""
    queue_events: int = Field(20_000, ge=1)
    """Events that may wait for a commit; beyond it intake answers 429."""
    retry_after_s: float = Field(1.0, gt=0)
    """What a 429 tells the client to wait."""
    retry_for_s: float = Field(10.0, gt=0)
    """How long a failed commit is tried again before its events are refused."""
    event_id_window_days: int = Field(30, ge=1)
    """How long an `event_id` is remembered for idempotency."""
