"""What a version must pass before any traffic (evaluation.md)."""

from cluster.settings.base import Section


class EvaluationSettings(Section):
    """Suites and gates."""
