"""Which base model an engine serves, so that an adapter of another one is recognised.

Two toy models of one shape load each other's adapters without an error and answer nonsense; the digest of
the base's files tells them apart.
"""

from pathlib import Path

from cluster.errors import InputError
from cluster.model_files import describe_base
from serve.engines.adapter_source import AdapterError

UNKNOWN_REVISION = "main"  # a hub model that was never downloaded here has no commit to compare


class BaseIdentity:
    """Location and revision of the engine's base model."""

    def __init__(self, base_model: str) -> None:
        self.location, self.revision = describe_base(base_model)
        self._known: dict[str, tuple[str, str]] = {self.location: (self.location, self.revision)}

    def check(self, base_model: str, revision: str | None) -> None:
        """Check a version's base model as the registry recorded it.

        Raises:
            AdapterError: it is another one.
        """
        if revision is not None and UNKNOWN_REVISION not in (revision, self.revision):
            if revision != self.revision:
                raise AdapterError(
                    f"it was made for another base model: {base_model} at {revision[:19]}, "
                    f"this engine serves {self.location} at {self.revision[:19]}"
                )
        elif not self._same_place(base_model):
            raise AdapterError(f"it was made for another base model: {base_model}, this engine serves {self.location}")

    def check_named(self, base_model: str | None) -> None:
        """Check the base model that an adapter's own configuration names.

        A directory that is not on this machine says nothing: adapters travel, their base's path does not. Nor
        does a name that is no directory here where this engine's base is one: it may be the same model.

        Raises:
            AdapterError: it names another base that is here, or another hub id.
        """
        if base_model is None or self._same_place(base_model):
            return
        if Path(self.location).is_dir() and not Path(base_model).is_dir():
            return
        try:
            known = self._known.get(base_model) or describe_base(base_model)
        except InputError:
            return
        self._known[base_model] = known
        if Path(base_model).is_dir() and not Path(self.location).is_dir():
            return
        self.check(known[0], known[1])

    def _same_place(self, base_model: str) -> bool:
        return base_model == self.location or str(Path(base_model).expanduser().resolve()) == self.location
