"""The live side: router and keys (serving.md)."""

from cluster.settings.base import Section


class ServeSettings(Section):
    """The router and how it is reached."""
