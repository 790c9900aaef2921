"""Keeps what an evaluation found, and moves the challenger.

The result stays with the version (tags `rayloop.gates`, `rayloop.gates_report`), in MLflow (a run with
`evaluation.json` and a report with plots) and in the event log (`model.updated`). Only a version that
passed becomes `challenger`.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy.engine import Engine

from cluster import tracking
from cluster.database import connect
from cluster.errors import ConflictError
from cluster.registry import GATES_TAG, Registry, Version
from cluster.settings import Settings
from data.alerts import alert
from data.aliases import give_alias, take_alias
from data.events import Event, parse_body
from data.grading.reward_model import RewardModel
from data.log import EventLog
from train.evaluate.calibration import refitted
from train.evaluate.evidence import Evidence
from train.evaluate.report import write_report
from train.evaluate.types import Evaluation, Gate
from train.files import write_file

log = logging.getLogger(__name__)

ACTOR = "evaluate"


def record(
    settings: Settings, registry: Registry, version: Version, found: Evaluation, evidence: Evidence | None
) -> Evaluation:
    """Keep the outcome in MLflow, with the version and in the log; the alias follows the verdict.

    Without `evidence` nothing could be asked or judged.
    """
    tags = {"rayloop.kind": "evaluation", "rayloop.version": found.version, "rayloop.against": found.against}
    with tracking.run(settings, f"evaluate {found.version}", tags=tags) as run:
        found = replace(found, run_id=run.run_id)
        run.log_params(
            {
                "version": found.version,
                "against": found.against,
                "grader": found.grader_version,
                "evaluation": settings.evaluation.model_dump(mode="json"),
            }
        )
        metrics = gate_metrics(found.gates)
        run.log_metrics(metrics)
        run.log_dataset(name=found.dataset_id, digest=found.dataset_hash, uri=found.dataset_id, context="evaluation")
        run.log_dict(found.to_json(), "evaluation.json")
        write_report(run, found, evidence)
        for grader in refitted(evidence, found.gates) if evidence is not None else []:
            run.log_artifact(keep_grader(settings, grader), "graders")
        if version.run_id:
            tracking.resume(settings, version.run_id).log_metrics(metrics)
    status = "passed" if found.passed else "failed"
    registry.tag(version, GATES_TAG, status)
    registry.tag(version, "rayloop.gates_report", json.dumps(_summary(found)))
    registry.tag(version, "rayloop.evaluation_run", found.run_id)
    engine = connect(settings)
    try:
        EventLog(engine).append(_events(settings, version, found, status))
        return replace(found, alias=_move_challenger(engine, registry, version, found))
    finally:
        engine.dispose()


def keep_grader(settings: Settings, grader: RewardModel) -> Path:
    """Write a grader's configuration to `<home>/graders/<version>.yaml`, for `evaluation.grader` and others to name."""
    file = settings.home / "graders" / f"{grader.version}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, yaml.safe_dump(grader.config.model_dump(mode="json"), sort_keys=False))
    log.warning("the grader's temperature no longer fits what people say; %s is one that does", file)
    return file


def gate_metrics(gates: list[Gate]) -> dict[str, float]:
    """Every number of every gate under a name MLflow accepts, for its compare view."""
    metrics: dict[str, float] = {}
    for gate in gates:
        name = gate.suite.replace("[", ".").replace("]", "")
        if gate.value is not None:
            metrics[f"gate.{name}"] = gate.value
        metrics |= {f"{name}.{key}": value for key, value in gate.metrics.items()}
    return metrics


def _move_challenger(engine: Engine, registry: Registry, version: Version, found: Evaluation) -> str | None:
    """The challenger is the latest version that passed; one that fails now is it no longer."""
    if found.passed and "champion" not in version.aliases:
        try:
            reason = f"passed its gates against {found.against}"
            give_alias(engine, registry, version, "challenger", actor=ACTOR, reason=reason)
        except ConflictError as error:
            log.warning("%s passed and does not become challenger: %s", version.id, error)
            return None
        return "challenger"
    if "challenger" in version.aliases:
        failed = ", ".join(gate.suite for gate in found.gates if not gate.passed)
        reason = f"failed its gates against {found.against}: {failed}"
        take_alias(engine, registry, version, "challenger", actor=ACTOR, reason=reason)
    return None


def _events(settings: Settings, version: Version, found: Evaluation, status: str) -> list[Event]:
    """What was found, and an alert for each drift."""
    details = {"gates": status, "against": found.against, "run_id": found.run_id, "report": _summary(found)}
    body = {
        "version": version.id,
        "change": "evaluated",
        "adapter_sha256": version.adapter_sha256,
        "dataset_hash": version.dataset_hash,
        "details": details,
    }
    parsed = parse_body("model.updated", body)
    told = [alert(settings, "drift", g.detail, g.metrics, version.id) for g in found.gates if g.metrics.get("alert")]
    return [Event("model.updated", settings.tenant, settings.workspace, parsed, agent=version.model), *told]


def _summary(found: Evaluation) -> dict[str, Any]:
    """The outcome in a few hundred characters, for a tag."""
    rows = [
        {
            "suite": g.suite,
            "status": g.status,
            "value": g.value,
            "threshold": g.threshold,
            "interval": g.interval,
        }
        for g in found.gates
    ]
    return {"passed": found.passed, "against": found.against, "dataset": found.dataset_hash, "gates": rows}
