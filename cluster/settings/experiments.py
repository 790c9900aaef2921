"""Experiments and rollouts (experiments.md)."""

from cluster.settings.base import Section


class ExperimentSettings(Section):
    """Assignment and statistics."""


class RolloutSettings(Section):
    """The rollout controller."""
