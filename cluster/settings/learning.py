"""The switches. Each is off by default; with `learning.enabled` off the router only routes."""

from pydantic import Field

from cluster.settings.base import Section


class LearningSettings(Section):
    """The master switch."""

    enabled: bool = False
    """Off: the router only routes; nothing is captured, learned or rolled out."""


class CaptureSettings(Section):
    """What is written to the event log."""

    enabled: bool = False
    """Write an interaction event for every request the router serves."""
    pseudonym_secret: str | None = Field(None, min_length=16, repr=False)
    """Key of the pseudonyms that stand for users. `None` means the file `secret.key` under `home`, made
    at first use; machines that share a database must share the key."""


class FeedbackSettings(Section):
    """Which signals count."""

    explicit: bool = False
    """Accept thumbs, ratings, corrections and the other explicit kinds."""
    implicit: bool = False
    """Compute signals from behaviour events."""


class TrajectoryEvaluationSettings(Section):
    """Whole runs of agents, with what they came to."""

    enabled: bool = False
    """Take trajectories in, from clients and from the spans of agents."""


class TrajectoryLoopSettings(Section):
    """What is learned from whole runs."""

    enabled: bool = False
    """Make examples of trajectories."""


class AutomationSettings(Section):
    """What happens without a person."""

    auto_finetune: bool = True
    """Start a training when a dataset is eligible (once learning is on)."""
    auto_experiment: bool = True
    """Start an experiment for a version that passed its gates (once learning is on)."""
    auto_rollout: bool = False
    """Advance through the stages without `rayloop rollout approve`."""
    rollback_on_regression: bool = True
    """Roll back when a guardrail is breached."""
