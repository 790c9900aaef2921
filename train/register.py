"""Puts what was trained into the registry, with the lineage its run left beside it, and says so in the log."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.jobs import Jobs
from cluster.model_files import read_adapter_config
from cluster.registry import Registry, Version
from cluster.settings import Settings
from data.erasure.versions import erased_since
from data.events import Event, parse_body
from data.log import EventLog
from train.jobs import ORIGIN


def register_base(settings: Settings, database: Engine, model: str, base: str, *, run_id: str | None = None) -> Version:
    """Register a base model, or a whole model that was trained, with the lineage of the run that made it.

    A base model as it comes becomes champion where there is none.
    """
    registry = Registry(settings)
    origin = read_origin(registry, Path(base), run_id)
    lineage = _lineage(settings, origin) if origin else None
    version = registry.register_base(model, base, lineage, origin.get("run_id"))
    append_update(settings, database, version, "registered")
    _tell_job(settings, database, origin.get("rayloop.job_id"), version)
    return version


def register_adapter(
    settings: Settings,
    database: Engine,
    model: str,
    adapter: Path,
    *,
    base: str | None = None,
    run_id: str | None = None,
) -> Version:
    """Register an adapter with the lineage of the run that made it.

    Raises:
        InputError: nothing says on which base model the adapter stands, or it is a reward model.
    """
    if read_adapter_config(adapter).get("task_type") == "SEQ_CLS":
        raise InputError(
            "adapter", str(adapter), "scores and does not answer", "ask it as a grader: rayloop train reward-server"
        )
    registry = Registry(settings)
    origin = read_origin(registry, adapter, run_id)
    base_model = base or origin.get("base_model")
    if not base_model:
        raise InputError(
            "base_model",
            None,
            f"is not known for adapter {str(adapter)!r}",
            "name it with --base-model or the run with --run",
        )
    version = registry.register_adapter(
        model,
        adapter,
        base_model=base_model,
        run_id=origin.get("run_id") or run_id,
        dataset_hash=origin.get("dataset_hash"),
        dataset_id=origin.get("dataset_id"),
        lineage=_lineage(settings, origin),
    )
    append_update(settings, database, version, "registered")
    _tell_job(settings, database, origin.get("rayloop.job_id"), version)
    return version


LINEAGE = (
    "dataset_id", "dataset_hash", "rayloop.job_id", "rayloop.method", "rayloop.grader", "init_adapter", "seed",
    "libraries", "template_digest", "prompt_digest",
)  # fmt: skip
"""Tags of a run that its version keeps."""


def _lineage(settings: Settings, origin: Mapping[str, str]) -> dict[str, str]:
    kept = {name: origin[name] for name in LINEAGE if origin.get(name)}
    tainted = erased_since(settings, origin.get("dataset_id"), origin.get("init_adapter"), origin.get("base_model"))
    return kept | {"rayloop.tenant": settings.tenant, "rayloop.workspace": settings.workspace} | tainted


def register_runs(settings: Settings, database: Engine, model: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Register every run of a training; returns its report with a `version` on top and in each run."""
    runs = []
    for run in report["runs"]:
        if run["weights"] == "full":
            version = register_base(settings, database, model, run["adapter_dir"], run_id=run["run_id"])
        else:
            version = register_adapter(settings, database, model, Path(run["adapter_dir"]), run_id=run["run_id"])
        runs.append({**run, "version": version.id})
    asked = next(run for run in runs if run["job_id"] == report["job_id"])
    return {**report, "version": asked["version"], "runs": runs}


def read_origin(registry: Registry, folder: Path, run_id: str | None) -> dict[str, str]:
    """Lineage of an adapter or a model: the tags of its MLflow run, else what its training left beside it."""
    if run_id is None:
        file = folder.resolve().parent / ORIGIN
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    import mlflow

    try:
        tags: Mapping[str, Any] = registry.client.get_run(run_id).data.tags
    except mlflow.MlflowException as error:
        raise NotFoundError(f"no MLflow run {run_id!r} ({error.error_code})") from None
    return {**{name: str(value) for name, value in tags.items()}, "run_id": run_id}


def append_update(settings: Settings, database: Engine, version: Version, change: str) -> None:
    """A `model.updated` event about a version."""
    body = {
        "version": version.id,
        "change": change,
        "adapter_sha256": version.adapter_sha256,
        "dataset_hash": version.dataset_hash,
        "details": {"run_id": version.run_id, "name": version.name},
    }
    event = Event(
        "model.updated",
        settings.tenant,
        settings.workspace,
        parse_body("model.updated", {key: value for key, value in body.items() if value is not None}),
        agent=version.model,
    )
    EventLog(database).append([event])


def _tell_job(settings: Settings, database: Engine, job_id: str | None, version: Version) -> None:
    if job_id is None:
        return
    try:
        Jobs(database, settings.tenant, settings.workspace).set_output(job_id, version.id)
    except (NotFoundError, ConflictError):
        return  # trained elsewhere, or its row has been cleared away
