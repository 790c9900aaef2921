"""A rollout as people and programs read it."""

from collections.abc import Mapping
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import to_iso
from cluster.tables import events
from data.log import EventLog
from serve.rollout.store import Rollout

LONGEST_TAG = 5000  # MLflow's limit
ON_TRIAL = ("running", "holding", "awaiting_approval", "promoting")


def describe(rollout: Rollout) -> dict[str, Any]:
    """Everything about a rollout as plain values; `stage` counts from 1."""
    experiment, config = rollout.experiment, rollout.settings
    return {
        "rollout_id": rollout.rollout_id,
        "experiment_id": experiment.experiment_id,
        "agent": experiment.agent,
        "modality": experiment.modality,
        "stable": experiment.stable,
        "candidate": experiment.candidate,
        "state": rollout.state,
        "stage": rollout.stage + 1,
        "stages": len(config.rollout.stages),
        "check": config.check(rollout.stage),
        "share": config.share(rollout.stage) if rollout.state in ON_TRIAL else 0.0,
        "reason": rollout.reason,
        "failure": rollout.progress.get("failure"),
        "frozen_by": rollout.progress.get("frozen_by"),
        "approved_stage": rollout.approved_stage,
        "decisions": rollout.decisions,
        "looks": rollout.progress.get("looks", []),
        "is_applied": rollout.pending_decision is None,
        "gates_override": config.gates_override,
        "outcome": experiment.outcome,
        "created_at": to_iso(rollout.created_at_us),
        "updated_at": to_iso(rollout.updated_at_us),
    }


def line(rollout: Rollout) -> str:
    """One line: what, where it stands, why."""
    known = describe(rollout)
    place = f"stage {known['stage']}/{known['stages']}, {known['share']:.0%}" if known["share"] else known["state"]
    state = known["state"].replace("_", " ") if known["share"] else "ended" if known["outcome"] else "not started"
    failure = f"; it cannot be looked at: {known['failure']}" if known["failure"] else ""
    return (
        f"{known['rollout_id']}  {known['candidate']} against {known['stable']}  "
        f"{state} ({place.replace('_', ' ')}): {known['reason']}{failure}"
    )


def last_decision(engine: Engine, rollout: Rollout) -> dict[str, Any] | None:
    """The newest recorded decision; `None` before the first."""
    return decision_body(engine, rollout, rollout.decisions)


def decision_body(engine: Engine, rollout: Rollout, number: int) -> dict[str, Any] | None:
    """A recorded decision by its number; `None` where there is none."""
    event_id = f"rollout:{rollout.rollout_id}:{number}"
    query = sa.select(events.c.seq).where(events.c.tenant == rollout.experiment.tenant, events.c.event_id == event_id)
    with engine.connect() as connection:
        seq = connection.execute(query).scalar()
    found = EventLog(engine).read(seq - 1, 1) if seq is not None else []
    return found[0].event.body if found else None


def summary(body: Mapping[str, Any]) -> str:
    """A decision and the numbers behind it as a short JSON text, for a tag in the registry."""
    evidence = body["evidence"].get("evidence") or {}
    readings = [evidence.get("primary"), *evidence.get("further_primaries", ()), *evidence.get("guardrails", ())]
    metrics = {
        reading["metric"]: {
            "candidate": reading["candidate"]["mean"],
            "control": reading["control"]["mean"],
            "users": [reading["candidate"]["users"], reading["control"]["users"]],
            "harm": [reading["harm_low"], reading["harm"], reading["harm_high"]],
            "margin": reading["margin"],
        }
        for reading in [*readings, *evidence.get("optional_guardrails", ())]
        if reading is not None and reading["harm"] is not None
    }
    said = {name: body[name] for name in ("rollout_id", "number", "outcome", "reason", "actor")}
    whole = orjson.dumps(said | {"metrics": metrics}).decode()
    return whole if len(whole) <= LONGEST_TAG else orjson.dumps(said | {"metrics": {}}).decode()[:LONGEST_TAG]


def table(decision: dict[str, Any] | None) -> str:
    """The metrics a decision rests on, one line each."""
    evidence = (decision or {}).get("evidence", {}).get("evidence")
    if not evidence:
        return "no metrics with this decision"
    readings = [
        evidence["primary"],
        *evidence["further_primaries"],
        *evidence["guardrails"],
        *evidence["optional_guardrails"],
    ]
    head = f"{'metric':<26}{'candidate':>11}{'stable':>11}{'harm in':>22}{'margin':>9}{'users':>12}"
    split = evidence["split"]
    tail = f"split {split['users']} (p {split['p_value']:.3g}), exposed {evidence['exposed']}"
    return "\n".join([head, *(_row(reading) for reading in readings), tail])


def _row(reading: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    users = f"{reading['candidate']['users']}/{reading['control']['users']}"
    low, high = reading["harm_low"], reading["harm_high"]
    bounds = reading["problem"] or f"[{number(low)}, {number(high)}]"
    return (
        f"{reading['metric']:<26}{number(reading['candidate']['mean']):>11}{number(reading['control']['mean']):>11}"
        f"{bounds:>22}{number(reading['margin']):>9}{users:>12}"
    )
