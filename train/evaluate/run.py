"""`rayloop evaluate`: put two versions to the same prompts, run the suites, keep what was found.

The result stays with the version (tags `rayloop.gates`, `rayloop.gates_report`), in MLflow (a run with
`evaluation.json` and a report with plots) and in the event log (`model.updated`). Only a version that
passed becomes `challenger`.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import tracking
from cluster.database import connect
from cluster.errors import InputError
from cluster.registry import GATES_TAG, Registry, Version
from cluster.settings import Settings
from data.alerts import alert
from data.events import Event, parse_body
from data.grading import AtHand, Grader, make_grader
from data.grading.reward_model import Scorer
from data.log import EventLog
from data.manifest import find_dataset, load_manifest
from train.evaluate.cases import read_cases
from train.evaluate.evidence import Answers, Evidence, ask
from train.evaluate.gates import SUITES, run_suites
from train.evaluate.human import ask_people
from train.evaluate.models import open_version
from train.evaluate.off_policy import read_logged
from train.evaluate.parity import template_digests
from train.evaluate.report import write_report
from train.evaluate.truth import read_truths
from train.evaluate.types import Evaluation, Gate, verdict
from train.rewards import open_scorer

log = logging.getLogger(__name__)


Known = dict[tuple[str, Path], Answers]
"""Answers of versions that others are compared with, to a dataset's prompts and every case."""


def evaluate(
    settings: Settings,
    version_ref: str,
    *,
    against: str = "champion",
    dataset_ref: str | None = None,
    known: Known | None = None,
) -> Evaluation:
    """Evaluate a version against another and record the outcome.

    Several versions evaluated with the same `known` ask the one they are all compared with only once.

    Raises:
        NotFoundError: no such version or dataset.
        InputError: both are the same version, or a suite's file is broken.
    """
    registry = Registry(settings)
    version = registry.get(version_ref)
    champion = resolve_opponent(registry, version, against)
    dataset = find_dataset(settings, dataset_ref or version.dataset_id or "latest")
    started = time.monotonic()
    evidence = gather(settings, registry, version, champion, dataset, known)
    evidence = ask_people(settings, version.model, evidence)
    gathered = time.monotonic()
    gates = run_suites(evidence)
    manifest = load_manifest(dataset)
    found = Evaluation(
        version=version.id,
        against=champion.id,
        passed=verdict(gates),
        gates=gates,
        dataset_id=manifest.dataset_id,
        dataset_hash=manifest.dataset_hash,
        prompts=len(evidence.truths),
        grader_version=evidence.grader.version,
        seconds={"answers": gathered - started, "suites": time.monotonic() - gathered},
    )
    return record(settings, registry, version, found, evidence)


def resolve_opponent(registry: Registry, version: Version, against: str) -> Version:
    """The version to compare with: an alias of the same model, or a full reference.

    Raises:
        InputError: it is the version itself.
    """
    ref = against if "/" in against or "@" in against else f"{version.model}@{against}"
    opponent = registry.get(ref)
    if opponent.id == version.id:
        raise InputError("against", against, f"is {version.id} itself", "name another version with --against")
    return opponent


def gather(
    settings: Settings,
    registry: Registry,
    version: Version,
    champion: Version,
    dataset: Path,
    known: Known | None = None,
) -> Evidence:
    """Ask both versions once, about the held-out truths and every case."""
    chosen = settings.evaluation
    known = {} if known is None else known
    scorer = open_scorer(chosen.reward_model)
    grader = make_grader(chosen.grader, field="evaluation.grader", at_hand=AtHand.of(settings.grader, scorer))
    wanted = [s.name for s in SUITES.values() if s.cases and s.name not in chosen.not_applicable]
    cases = {name: read_cases(name, chosen.suites) for name in wanted}
    truths = read_truths(dataset, limit=chosen.max_prompts)
    logged = [] if "off_policy" in chosen.not_applicable else read_logged(dataset, limit=chosen.max_logged)
    every = [case for rows in cases.values() for case in rows]

    def answers(role: Version) -> Answers:
        log.info("%s answers %d prompts", role.id, len(truths) + len(every))
        with open_version(settings, registry, role) as model:
            return ask(model, truths, every, logged)

    if (champion.id, dataset) not in known:
        known[champion.id, dataset] = answers(champion)
    return Evidence(
        settings=chosen,
        truths=truths,
        candidate=answers(version),
        champion=known[champion.id, dataset],
        grader=grader,
        cases=cases,
        reward_model=as_grader(scorer),
        logged=logged,
        template=template_digests(version),
    )


def as_grader(scorer: Scorer | None) -> Grader | None:
    """The reward model at hand as a grader of its raw scores' order."""
    if scorer is None:
        return None
    config = {"type": "reward_model", "name": "reward_model", "adapter_sha256": scorer.adapter_sha256}
    return make_grader(config, at_hand=AtHand(scorer=scorer))


def record(
    settings: Settings, registry: Registry, version: Version, found: Evaluation, evidence: Evidence
) -> Evaluation:
    """Keep the outcome in MLflow, with the version and in the log; the alias follows the verdict."""
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
        if version.run_id:
            tracking.resume(settings, version.run_id).log_metrics(metrics)
    status = "passed" if found.passed else "failed"
    registry.tag(version, GATES_TAG, status)
    registry.tag(version, "rayloop.gates_report", json.dumps(_summary(found)))
    registry.tag(version, "rayloop.evaluation_run", found.run_id)
    alias = _move_challenger(registry, version, found)
    found = replace(found, alias=alias)
    _append_events(settings, version, found, status)
    return found


def gate_metrics(gates: list[Gate]) -> dict[str, float]:
    """Every number of every gate under a name MLflow accepts, for its compare view."""
    metrics: dict[str, float] = {}
    for gate in gates:
        name = gate.suite.replace("[", ".").replace("]", "")
        if gate.value is not None:
            metrics[f"gate.{name}"] = gate.value
        metrics |= {f"{name}.{key}": value for key, value in gate.metrics.items()}
    return metrics


def _move_challenger(registry: Registry, version: Version, found: Evaluation) -> str | None:
    """The challenger is the latest version that passed; one that fails now is it no longer."""
    if found.passed and "champion" not in version.aliases:
        reason = f"passed its gates against {found.against}"
        registry.set_alias(version.model, "challenger", version, actor="evaluate", reason=reason)
        return "challenger"
    if "challenger" in version.aliases:
        registry.remove_alias(version.model, "challenger")
    return None


def _append_events(settings: Settings, version: Version, found: Evaluation, status: str) -> None:
    details = {"gates": status, "against": found.against, "run_id": found.run_id, "report": _summary(found)}
    body = {
        "version": version.id,
        "change": "evaluated",
        "adapter_sha256": version.adapter_sha256,
        "dataset_hash": version.dataset_hash,
        "details": details,
    }
    bodies = [body]
    if found.alias:
        bodies.append({**body, "change": "alias", "alias": found.alias, "details": {"actor": "evaluate"}})
    engine = connect(settings)
    try:
        told = [
            alert(settings, "drift", g.detail, g.metrics, version.id) for g in found.gates if g.metrics.get("alert")
        ]
        EventLog(engine).append([*(_event(settings, version.model, body) for body in bodies), *told])
    finally:
        engine.dispose()


def _event(settings: Settings, agent: str, body: Mapping[str, Any]) -> Event:
    parsed = parse_body("model.updated", dict(body))
    return Event("model.updated", settings.tenant, settings.workspace, parsed, agent=agent)


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
