"""The configuration: one optional `rayloop.yaml`, environment variables over it, defaults under it.

Every number of the system is a field here, with its bound and its unit in its name. One module a
section; `load_settings()` is the only reader of the file and the environment. Processes started by
Rayloop get the resolved settings handed to them, they do not read the file again.
"""

from cluster.settings.load import Origin, load_settings
from cluster.settings.model import Settings

__all__ = ["Origin", "Settings", "load_settings"]
