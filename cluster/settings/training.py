"""Training, sweeps and evaluation (training.md, evaluation.md)."""

from cluster.settings.base import Section


class TrainingSettings(Section):
    """Defaults of every training run."""


class SweepSettings(Section):
    """Defaults of a sweep."""
