"""What an erasure says to the registry: which versions learned from the person, and may not go further."""

import json
import logging
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from cluster.clock import now_us, to_iso
from cluster.registry import EXPORT_TAGS, NEEDS_RETRAINING_TAG, Registry, Version
from cluster.settings import Settings
from data.aliases import take_alias
from data.events import Event, parse_body
from data.log import EventLog
from data.manifest import list_datasets

log = logging.getLogger(__name__)

REASON = "a person in its training data was erased"
REPORTS = {
    "evaluation": frozenset({"report.md", "report.html"}),
    "comparison": frozenset({"comparison.json", "comparison.html"}),
}
"""Artifacts that quote held-out prompts and answers, by the kind of their run."""


def mark_versions(engine: Engine, settings: Settings, tenant: str, dataset_ids: list[str]) -> dict[str, list[str]]:
    """Mark every version trained on these datasets, or from such a version; returns the ids of `versions`, and
    their `exports`.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    if not dataset_ids or not _has_registry(settings):
        return {"versions": [], "exports": []}
    registry = Registry(settings)
    known = [version for model in registry.models() for version in registry.versions(model)]
    found = with_descendants([v for v in known if _learned_from(v, dataset_ids, tenant)], known)
    for version in found:
        if NEEDS_RETRAINING_TAG not in version.tags:
            for name, value in _tags().items():
                registry.tag(version, name, value)
        if "challenger" in version.aliases:
            take_alias(engine, registry, version, "challenger", actor="erase", reason=REASON)
        _announce(engine, settings, tenant, version)
    for dataset_id in dataset_ids:
        for kind, names in REPORTS.items():
            _remove_reports(registry, dataset_id, kind, names)
    exports = [value for version in found for tag, value in version.tags.items() if tag.startswith(EXPORT_TAGS)]
    return {"versions": sorted(v.id for v in found), "exports": sorted(exports)}


def with_descendants(versions: list[Version], known: list[Version]) -> list[Version]:
    """These versions and all of `known` whose training began from one of them, directly or not."""
    found = {version.id: version for version in versions}
    while fresh := [v for v in known if v.id not in found and any(_began_from(v, one) for one in found.values())]:
        found |= {version.id: version for version in fresh}
    return list(found.values())


def _began_from(version: Version, other: Version) -> bool:
    """Whether a version's training started with the weights of another."""
    return starts_from(version.tags.get("init_adapter"), version.base_model, other)


def starts_from(init_adapter: str | None, base_model: str | None, version: Version) -> bool:
    """Whether an adapter to start from (a folder named for its digest), or a base model, is that of a version."""
    if version.adapter_sha256 is not None:
        return init_adapter is not None and Path(init_adapter).name == version.adapter_sha256
    return "dataset_id" in version.tags and base_model == version.base_model


def erased_since(
    settings: Settings, dataset_id: str | None, init_adapter: str | None = None, base_model: str | None = None
) -> dict[str, str]:
    """Tags for a version that is registered after somebody in its dataset, or in what it started from, was erased;
    else empty."""
    known = list_datasets(settings) if dataset_id else []
    if any(m.dataset_id == dataset_id and m.erased_rows for m in known):
        return _tags()
    if not dataset_id or not _has_registry(settings):
        return {}
    registry = Registry(settings)
    versions = (version for model in registry.models() for version in registry.versions(model))
    marked = (version for version in versions if version.needs_retraining)
    return _tags() if any(starts_from(init_adapter, base_model, version) for version in marked) else {}


def _tags() -> dict[str, str]:
    return {NEEDS_RETRAINING_TAG: json.dumps({"reason": REASON, "at": to_iso(now_us())})}


def _has_registry(settings: Settings) -> bool:
    """Whether there can be versions: an embedded registry is made at first use."""
    uri = settings.tracking_uri
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def _learned_from(version: Version, dataset_ids: list[str], tenant: str) -> bool:
    return version.dataset_id in dataset_ids and version.tags.get("rayloop.tenant", tenant) == tenant


def _announce(engine: Engine, settings: Settings, tenant: str, version: Version) -> None:
    body = {"version": version.id, "change": "blocked", "details": {"reason": "needs retraining after an erasure"}}
    event = Event(
        "model.updated",
        tenant,
        settings.workspace,
        parse_body("model.updated", body),
        event_id=f"needs-retraining:{version.id}",
        agent=version.model,
    )
    EventLog(engine).append([event])


def _remove_reports(registry: Registry, dataset_id: str, kind: str, names: frozenset[str]) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client: Any = registry.client
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"dataset.name = '{dataset_id}' and tags.`rayloop.kind` = '{kind}'"
    token = None
    while True:
        runs = client.search_runs(experiments, query, page_token=token)
        for run in runs:
            present = {file.path for file in client.list_artifacts(run.info.run_id)}
            repository = get_artifact_repository(run.info.artifact_uri)
            for name in present.intersection(names):
                repository.delete_artifacts(name)
        token = runs.token
        if not token:
            return
