"""MLflow runs: one quiet client a tracking address, and a context manager around a run.

Importing MLflow takes a second, so it is imported on first use. The fluent API (`mlflow.start_run`) keeps
a global active run, which threads and Ray trials would share; everything here names its run by id.
"""

import functools
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from cluster.clock import now_us
from cluster.errors import UnavailableError
from cluster.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PARAM_LIMIT = 5_000  # MLflow refuses longer parameter values (6,000 characters)
BATCH_LIMIT = 100  # and more parameters in one call
NO_ANSWER = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's codes for a server that cannot be reached or does not cope."""
SECRET_FIELDS = ("secret", "password", "api_key", "access_key")

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Set before MLflow is imported, unless the environment already says otherwise."""


def client(settings: Settings) -> "MlflowClient":
    """The client of the configured tracking address, its database created on first use.

    Raises:
        UnavailableError: the server does not answer or the database cannot be opened.
    """
    return _client(settings.tracking_uri)


@functools.cache
def _client(uri: str) -> "MlflowClient":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        opened = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        opened.search_experiments(max_results=1)
    except (mlflow.MlflowException, sa.exc.SQLAlchemyError, OSError) as error:
        raise _no_answer(uri, error) from None
    return opened


class Translated:
    """A client that says of a server which went away after it was opened what `client` says of one that is not there.

    What MLflow refuses (no such model, a name it cannot hold) comes through as it is.
    """

    def __init__(self, settings: Settings) -> None:
        self._client, self._uri = client(settings), settings.tracking_uri

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        return self._translated(value) if callable(value) else value

    def _translated(self, method: Callable[..., Any]) -> Callable[..., Any]:
        import mlflow

        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return method(*arguments, **named)
            except mlflow.MlflowException as error:
                if error.error_code not in NO_ANSWER:
                    raise
                raise _no_answer(self._uri, error) from error
            except (sa.exc.SQLAlchemyError, OSError) as error:
                raise _no_answer(self._uri, error) from error

        return call


def _no_answer(uri: str, error: Exception) -> UnavailableError:
    cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UnavailableError(
        f"MLflow at {_without_password(uri)} does not answer ({cause}); start it or set `mlflow.tracking_uri`"
    )


def passing_errors() -> tuple[type[Exception], ...]:
    """What MLflow, its server or a database may raise now and not at the next try."""
    import mlflow

    return mlflow.MlflowException, sa.exc.SQLAlchemyError, OSError, UnavailableError


def experiment_id(settings: Settings) -> str:
    """Id of the configured experiment, created with our artifact location if it does not exist."""
    import mlflow

    name, found = (
        settings.mlflow.experiment,
        client(settings).get_experiment_by_name(settings.mlflow.experiment),
    )
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client(settings).create_experiment(name, artifact_location=_artifact_root(settings)))
    except mlflow.MlflowException:  # another process was first
        found = client(settings).get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _artifact_root(settings: Settings) -> str | None:
    if settings.mlflow.artifact_location:
        return settings.mlflow.artifact_location
    if settings.tracking_uri.startswith(("http://", "https://")):
        return None
    return (settings.home / "mlartifacts").as_uri()


@dataclass(frozen=True)
class Run:
    """An open MLflow run; every method writes at once."""

    run_id: str
    client: "MlflowClient"

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings become dotted names."""
        from mlflow.entities import Param

        params = [Param(name, _shown(value)[:PARAM_LIMIT]) for name, value in flatten(values)]
        for start in range(0, len(params), BATCH_LIMIT):
            self.client.log_batch(self.run_id, params=params[start : start + BATCH_LIMIT])

    def log_metrics(self, values: Mapping[str, float | int | None], step: int = 0) -> None:
        """Log numbers at a step; `None` is left out."""
        from mlflow.entities import Metric

        at_ms = now_us() // 1000
        present = {name: float(value) for name, value in values.items() if value is not None}
        if present:
            metrics = [Metric(name, value, at_ms, step) for name, value in present.items()]
            self.client.log_batch(self.run_id, metrics=metrics)

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags on the run."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(name, _shown(value)) for name, value in values.items()])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file or a directory."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Upload text as the artifact `name`, which may contain folders."""
        self.log_bytes(text.encode(), name)

    def log_bytes(self, content: bytes, name: str) -> None:
        """Upload a file's content as the artifact `name`, which may contain folders."""
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / file
            path.write_bytes(content)
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def log_dict(self, value: Any, name: str) -> None:
        """Upload a value as indented JSON."""
        self.log_text(json.dumps(value, indent=2, default=str) + "\n", name)

    def log_dataset(self, *, name: str, digest: str, uri: str, context: str) -> None:
        """Refer to a dataset by hash; nothing is uploaded. `context`: training, evaluation, …"""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=json.dumps({"uri": uri}))
        tag = InputTag(key="mlflow.data.context", value=context)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset=dataset, tags=[tag])])


@contextmanager
def run(
    settings: Settings, name: str, *, parent_run_id: str | None = None, tags: Mapping[str, Any] | None = None
) -> Iterator[Run]:
    """An MLflow run that ends FINISHED, FAILED or KILLED with the block; `parent_run_id` nests it.

    The resolved settings (without secrets) and the git commit go with every run.
    """
    opened = client(settings)
    all_tags = {"rayloop.tenant": settings.tenant, "rayloop.workspace": settings.workspace, **(tags or {})}
    if parent_run_id:
        all_tags["mlflow.parentRunId"] = parent_run_id
    if commit := git_commit():
        all_tags["mlflow.source.git.commit"] = commit
    shown = {key: _shown(value) for key, value in all_tags.items()}
    info = opened.create_run(experiment_id(settings), run_name=name, tags=shown).info
    current = Run(info.run_id, opened)
    with _ended(current):
        current.log_dict(public_settings(settings), "settings.json")
        yield current


@contextmanager
def reopen(settings: Settings, run_id: str) -> Iterator[Run]:
    """An existing run that goes on, and ends with the block as a new one does."""
    current = resume(settings, run_id)
    current.client.update_run(run_id, status="RUNNING")
    with _ended(current):
        yield current


@contextmanager
def _ended(current: Run) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        current.client.set_terminated(current.run_id, "KILLED")
        raise
    except BaseException:
        current.client.set_terminated(current.run_id, "FAILED")
        raise
    current.client.set_terminated(current.run_id, "FINISHED")


def resume(settings: Settings, run_id: str) -> Run:
    """An existing run, to write more into it; its status does not change."""
    return Run(run_id, client(settings))


@functools.cache
def git_commit() -> str | None:
    """Commit of the project's checkout, with `-dirty` where files differ; `None` outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def public_settings(settings: Settings) -> dict[str, Any]:
    """The resolved settings with passwords and secrets removed."""
    public: dict[str, Any] = _redact(settings.model_dump(mode="json"))
    if public["database"]["url"]:
        public["database"]["url"] = _without_password(public["database"]["url"])
    return public


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings, with dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        hidden = {k for k in value if k.endswith(SECRET_FIELDS) and value[k]}
        return {k: "***" if k in hidden else _redact(v) for k, v in value.items()}
    return [_redact(v) for v in value] if isinstance(value, list) else value


def _without_password(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return url


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
