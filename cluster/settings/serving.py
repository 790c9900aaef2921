"""The live side: router, engines, keys (serving.md)."""

from cluster.settings.base import Section


class ServeSettings(Section):
    """The router and how it is reached."""


class EngineSettings(Section):
    """The embedded engine."""
