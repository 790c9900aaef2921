"""Registered versions, on MLflow: `triage/3` is version 3 of the model (agent) `triage`.

A version is a base model plus an adapter. Only the adapter's two files are uploaded, as artifacts of the
run that made them; no model flavour is involved, so no base weights are copied. What a version is made of
stands in its tags (`base_model`, `base_revision`, `adapter_sha256`, `rank`, `dataset_hash`, …).
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import stamina

from cluster import tracking
from cluster.clock import now_us, to_iso
from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.model_files import (
    ADAPTER_FILES,
    CANARY_FILE,
    adapter_digest,
    describe_base,
    file_digest,
    move_into_place,
    read_adapter_config,
)
from cluster.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}")
WRITE_TRIES = 5

RETRAIN = "somebody in its training data was erased; curate and train again"

NAME_TAG = "rayloop.name"
GATES_TAG = "rayloop.gates"
"""`passed`, `failed` or `not_run`."""
NEEDS_RETRAINING_TAG = "rayloop.needs_retraining"
"""Set when somebody in the training data was erased: JSON with `reason` and `at`."""
ENDPOINT_TAG = "rayloop.endpoint"
"""Who keeps the weights, where they are not here."""
METHOD_TAG = "rayloop.method"  # how it was trained; base models as they come have none
EXPORT_TAGS = "rayloop.export"
"""Tags that begin so say where the version was exported to."""


@dataclass(frozen=True)
class Version:
    """One registered version with its lineage."""

    id: str
    """`<model>/<number>`."""
    model: str
    number: int
    name: str
    """`v1.{yyww}.{iteration}`: ISO year and week, and the count within that week."""
    base_model: str
    """Local path or hub id."""
    adapter_path: Path | None
    """Local copy of the adapter, where there is one; `Registry.adapter_dir` fetches it."""
    adapter_sha256: str | None
    """`None`: the base model itself."""
    rank: int | None
    dataset_hash: str | None
    dataset_id: str | None
    run_id: str | None
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def served_name(self) -> str:
        """The model's name inside an engine; content-hashed, so that no cache confuses two adapters."""
        if self.adapter_sha256 is None:
            return "base"
        return f"{self.model}-{self.number}-{self.adapter_sha256[:12]}"

    @property
    def gates(self) -> str:
        """`passed`, `failed` or `not_run`."""
        return self.tags.get(GATES_TAG, "not_run")

    @property
    def endpoint(self) -> str | None:
        """Address of the endpoint that keeps its weights; `None` for those that are here."""
        return self.tags.get(ENDPOINT_TAG)

    @property
    def trained(self) -> bool:
        """True for what was trained on an agent's feedback: an adapter, a whole model, or what an endpoint trained."""
        return self.adapter_sha256 is not None or self.endpoint is not None or METHOD_TAG in self.tags

    @property
    def trained_behind(self) -> str | None:
        """Digest of the agent's prompt in training, empty where there was none; `None`: a base, which may have any."""
        return self.tags.get("prompt_digest", "") if self.trained else None

    @property
    def needs_retraining(self) -> bool:
        """True when somebody in its training data was erased; it may go no further."""
        return NEEDS_RETRAINING_TAG in self.tags


class Registry:
    """The model registry behind the configured MLflow address; no connection until it is used."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def client(self) -> "MlflowClient":
        """The MLflow client.

        Raises:
            UnavailableError: MLflow does not answer, here and in every call.
        """
        return cast("MlflowClient", tracking.Translated(self.settings))

    def register_base(
        self,
        model: str,
        base_model_path: str | Path,
        lineage: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> Version:
        """Register a base model without adapter; one as it comes becomes champion if the model has none.

        `lineage` becomes tags, of a model whose weights were all trained, by the run `run_id`. The same base
        registered again is returned as it is.
        """
        check_model_name(model)
        base, revision = describe_base(base_model_path)
        for known in self.versions(model):
            if known.adapter_sha256 is None and known.tags.get("base_revision") == revision:
                return known
        if run_id is None:
            with tracking.run(self.settings, f"register {model} base", tags={"rayloop.kind": "register"}) as run:
                run.log_params({"base_model": base, "base_revision": revision})
                run_id = run.run_id
        tags = {"base_model": base, "base_revision": revision, GATES_TAG: "not_run", **_present(dict(lineage or {}))}
        version = self._create(model, self.client.get_run(run_id).info.artifact_uri, run_id, tags)
        if not version.trained and not any("champion" in known.aliases for known in self.versions(model)):
            self.set_alias(model, "champion", version, actor="registry", reason="first version")
        return self.get(version.id)

    def register_adapter(
        self,
        model: str,
        adapter_dir: str | Path,
        *,
        base_model: str | Path,
        run_id: str | None = None,
        dataset_hash: str | None = None,
        dataset_id: str | None = None,
        lineage: Mapping[str, str] | None = None,
    ) -> Version:
        """Upload an adapter's files and register them as the next version of `model`.

        `lineage` becomes tags as it is (`rayloop.job_id`, …). Without `run_id` a run is made.

        Raises:
            InputError: not a LoRA adapter in safetensors, or a name MLflow cannot hold.
        """
        check_model_name(model)
        folder = Path(adapter_dir)
        config, digest = read_adapter_config(folder), adapter_digest(folder)
        base, revision = describe_base(base_model)
        if run_id is None:
            with tracking.run(self.settings, f"register {model}", tags={"rayloop.kind": "register"}) as made:
                run_id = made.run_id
        artifact_path = f"adapter/{digest[:12]}"
        canary = folder / CANARY_FILE
        for name in (*ADAPTER_FILES, *((CANARY_FILE,) if canary.is_file() else ())):
            self.client.log_artifact(run_id, str(folder / name), artifact_path)
        tags = {
            "base_model": base,
            "base_revision": revision,
            "adapter_sha256": digest,
            "rank": str(config["r"]),
            GATES_TAG: "not_run",
            "rayloop.tenant": self.settings.tenant,
            "rayloop.workspace": self.settings.workspace,
            **_present({"dataset_hash": dataset_hash, "dataset_id": dataset_id}),
            **({"canary_sha256": file_digest(canary).hex()} if canary.is_file() else {}),
            **_present(dict(lineage or {})),
        }
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{artifact_path}"
        return self._create(model, source, run_id, tags)

    def register_remote(
        self,
        model: str,
        remote_model: str,
        *,
        endpoint: str,
        run_id: str,
        dataset_hash: str,
        dataset_id: str,
        lineage: Mapping[str, str],
    ) -> Version:
        """Register a model that another endpoint trained and keeps; there are no files of it here.

        Its `base_model` is the name it has there.
        """
        check_model_name(model)
        tags = {
            "base_model": remote_model,
            ENDPOINT_TAG: endpoint,
            "dataset_hash": dataset_hash,
            "dataset_id": dataset_id,
            GATES_TAG: "not_run",
            "rayloop.tenant": self.settings.tenant,
            "rayloop.workspace": self.settings.workspace,
            **_present(dict(lineage)),
        }
        return self._create(model, self.client.get_run(run_id).info.artifact_uri, run_id, tags)

    def get(self, ref: str) -> Version:
        """The version named by `triage/3` or `triage@champion`.

        Raises:
            NotFoundError: there is none; the message names those there are.
            InputError: not a reference.
        """
        model, separator, rest = re.match(r"([^/@]*)([/@]?)(.*)", ref).groups()  # type: ignore[union-attr]
        if not model or not separator or not rest or (separator == "/" and not rest.isdecimal()):
            raise InputError("version", ref, "is not a version", "write MODEL/NUMBER or MODEL@ALIAS")
        known = self.versions(model)
        for version in known:
            if rest in version.aliases if separator == "@" else version.number == int(rest):
                return version
        raise NotFoundError(f"no version {ref!r}; there are {_list_known(known, self.models())}")

    def versions(self, model: str) -> list[Version]:
        """All versions of `model`, oldest first; empty for an unknown model."""
        import mlflow

        try:
            aliases = self.client.get_registered_model(model).aliases
        except mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise
        by_number: dict[int, list[str]] = {}
        for alias, number in aliases.items():
            by_number.setdefault(int(number), []).append(alias)
        rows = self.client.search_model_versions(f"name = '{model}'")
        found = [self._version(row, tuple(sorted(by_number.get(int(row.version), ())))) for row in rows]
        return sorted(found, key=lambda version: version.number)

    def models(self) -> list[str]:
        """Names of the registered models."""
        return sorted(model.name for model in self.client.search_registered_models())

    def set_alias(self, model: str, alias: str, version: Version | str, *, actor: str, reason: str) -> None:
        """Point `alias` at a version; who and why stay with the version.

        Raises:
            ConflictError: the version may not have it (`check_alias`).
        """
        target = self.get(version if isinstance(version, str) else version.id)
        if target.model != model:
            raise InputError("version", target.id, f"is not a version of {model!r}", "name one that is")
        self.check_alias(target, alias)
        _settled(lambda: self.client.set_registered_model_alias(model, alias, str(target.number)))
        record = {"actor": actor, "reason": reason, "at": to_iso(now_us())}
        self.tag(target, f"rayloop.alias.{alias}", json.dumps(record))

    def check_alias(self, version: Version, alias: str) -> None:
        """Refuse an alias that a version may not have.

        Raises:
            ConflictError: `challenger` for a version that has not passed its gates, or any alias for one
                that needs retraining.
        """
        target = self.get(version.id)
        was_champion = "rayloop.alias.champion" in target.tags  # a rollback may return to it
        if target.needs_retraining and not (alias == "champion" and was_champion):
            raise ConflictError(f"{target.id} may not be {alias}: {RETRAIN}")
        if alias == "challenger" and target.gates != "passed":
            raise ConflictError(f"{target.id} may not be challenger: gates are {target.gates}; run `rayloop evaluate`")

    def remove_alias(self, model: str, alias: str, *, actor: str, reason: str) -> None:
        """Let no version hold `alias`; nothing happens if none does. Who and why stay with the version that did."""
        for version in self.versions(model):
            if alias in version.aliases:
                self.client.delete_registered_model_alias(model, alias)
                record = {"actor": actor, "reason": reason, "at": to_iso(now_us()), "removed": True}
                self.tag(version, f"rayloop.alias.{alias}", json.dumps(record))

    def tag(self, version: Version | str, key: str, value: str) -> None:
        """Set a tag of a version."""
        target = version if isinstance(version, Version) else self.get(version)
        _settled(lambda: self.client.set_model_version_tag(target.model, str(target.number), key, value))

    def adapter_dir(self, version: Version | str) -> Path:
        """A local directory with the adapter's files, downloaded once and verified against the digest.

        Raises:
            InputError: the version is a base model without adapter.
            ConflictError: what was downloaded is not what was registered.
        """
        target = version if isinstance(version, Version) else self.get(version)
        if target.adapter_sha256 is None or target.run_id is None:
            raise InputError("version", target.id, "has no adapter", "use its base model")
        final = self._cached(target.adapter_sha256)
        if final.is_dir() and adapter_digest(final) == target.adapter_sha256:
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".download-") as temporary:
            path = f"adapter/{target.adapter_sha256[:12]}"
            fetched = Path(self.client.download_artifacts(target.run_id, path, temporary))
            found = adapter_digest(fetched)
            if found != target.adapter_sha256:
                raise ConflictError(
                    f"the adapter of {target.id} was altered: sha256 {found[:12]}…, "
                    f"registered {target.adapter_sha256[:12]}…"
                )
            move_into_place(fetched, final)
        return final

    def _cached(self, digest: str) -> Path:
        return self.settings.home / "adapters" / digest

    def _create(self, model: str, source: str, run_id: str, tags: dict[str, str]) -> Version:
        import mlflow

        try:
            self.client.create_registered_model(model)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        row = self.client.create_model_version(model, source=source, run_id=run_id, tags=tags)
        self.client.set_model_version_tag(model, row.version, NAME_TAG, self._human_name(model, row))
        return self.get(f"{model}/{row.version}")

    def _human_name(self, model: str, row: Any) -> str:
        """`v1.{yyww}.{iteration}`; numbers are unique, so counting the earlier ones cannot collide."""
        stem = f"v1.{_yyww(row.creation_timestamp)}."
        earlier = [other for other in self.versions(model) if other.number < int(row.version)]
        taken = [int(v.name.removeprefix(stem)) for v in earlier if v.name.startswith(stem)]
        return f"{stem}{max(taken, default=0) + 1}"

    def _version(self, row: Any, aliases: tuple[str, ...]) -> Version:
        tags = dict(row.tags)
        digest = tags.get("adapter_sha256")
        cached = self._cached(digest) if digest else None
        return Version(
            id=f"{row.name}/{row.version}",
            model=row.name,
            number=int(row.version),
            name=tags.get(NAME_TAG, ""),
            base_model=tags.get("base_model", ""),
            adapter_path=cached if cached and cached.is_dir() else None,
            adapter_sha256=digest,
            rank=int(tags["rank"]) if "rank" in tags else None,
            dataset_hash=tags.get("dataset_hash"),
            dataset_id=tags.get("dataset_id"),
            run_id=row.run_id or None,
            tags=tags,
            aliases=aliases,
        )


def check_model_name(model: str) -> None:
    """Raises InputError for a name that MLflow cannot hold."""
    if not MODEL_NAME.fullmatch(model):
        raise InputError("model", model, "must be letters, digits, `.`, `_` or `-`", "choose another name")


def _yyww(at_ms: int) -> str:
    year, week, _ = datetime.fromtimestamp(at_ms / 1000, UTC).isocalendar()
    return f"{year % 100:02d}{week:02d}"


def _present(values: Mapping[str, str | None]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value not in (None, "")}


def _list_known(versions: list[Version], models: list[str]) -> str:
    if versions:
        return ", ".join(v.id + "".join(f" (@{alias})" for alias in v.aliases) for v in versions)
    return f"the models {', '.join(models)}" if models else "no registered models"


def _settled(write: Callable[[], None]) -> None:
    """Write an alias or a tag. MLflow inserts where it finds no row, so of two processes that write the first one
    at once one is refused; it finds the other's row when it tries again."""
    for attempt in stamina.retry_context(on=_is_taken, attempts=WRITE_TRIES, timeout=None, wait_initial=0.05):
        with attempt:
            write()


def _is_taken(error: Exception) -> bool:
    return "unique constraint" in str(error).lower()
