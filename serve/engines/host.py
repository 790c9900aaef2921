"""What every engine offers to those who manage its adapters (reconciler.py) and to its HTTP side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.settings.engines import EngineSettings
from serve.engines.base_model import BaseIdentity

BASE_NAME = "base"


@dataclass(frozen=True)
class ServedModel:
    """One name a request may ask for."""

    name: str
    adapter_path: str | None
    loaded_at: int
    """Seconds since 1970."""


class AdapterHost(Protocol):
    """An engine that holds adapters."""

    settings: EngineSettings
    base: BaseIdentity
    template_digest: str

    def models(self) -> list[ServedModel]:
        """Every name that can be asked for, the base first."""
        ...

    def load_adapter(self, name: str, path: Path | str, *, expected_sha256: str | None = None) -> Any:
        """Read, check and make available an adapter; its `sha256` and `rank`.

        Raises:
            AdapterError: one of the checks failed; the message says which.
        """
        ...

    def unload_adapter(self, name: str) -> bool:
        """Take an adapter away; false if it was not there."""
        ...
