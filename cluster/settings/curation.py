"""From events to a dataset (curation.md)."""

from cluster.settings.base import Section


class CurationSettings(Section):
    """The curation pipeline."""
