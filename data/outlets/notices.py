"""Which events people should hear of, and in what words."""

from collections.abc import Callable
from typing import Any

from cluster.notify import Notice
from cluster.settings.outlets import Severity
from data.events import Event, RecordedEvent

Words = tuple[Severity, str, str]
"""Severity, title, text."""

DECISIONS: dict[str, tuple[Severity, str]] = {
    "start": ("success", "has its first users"),
    "advance": ("success", "advances"),
    "promote": ("success", "is promoted"),
    "approve": ("success", "was approved"),
    "unfreeze": ("success", "goes on"),
    "await_approval": ("ticket", "waits for approval"),
    "hold": ("ticket", "holds"),
    "freeze": ("ticket", "is frozen"),
    "rollback": ("page", "is rolled back"),
    "fail": ("page", "failed"),
}
"""Outcome of a rollout's decision -> how urgent it is, and its words."""


def _decision(event: Event) -> Words | None:
    body = event.body
    severity, words = DECISIONS.get(body["outcome"], ("ticket", body["outcome"]))
    title = f"{event.agent}: rollout {body['rollout_id']} {words}"
    share = f"share {body['share_before']:.0%} -> {body['share_after']:.0%}, by {body['actor']}"
    return severity, title, f"{body['reason']}\n{share}"


def _dataset(event: Event) -> Words | None:
    body = event.body
    return "success", f"{event.agent or 'dataset'}: {body['dataset_id']} is ready", f"hash {body['dataset_hash']}"


def _model(event: Event) -> Words | None:
    body, change = event.body, event.body["change"]
    details = body.get("details", {})
    if change == "evaluated":
        passed = details.get("gates") == "passed"
        verdict = "passed its gates" if passed else "failed its gates"
        return ("success" if passed else "ticket"), f"{body['version']} {verdict}", f"against {details.get('against')}"
    if change == "registered":
        return "success", f"{body['version']} is registered", f"adapter {body.get('adapter_sha256') or 'none'}"
    if change == "alias":
        return "success", f"{body['version']} is now {body.get('alias')}", str(details.get("reason") or "")
    if change == "alias_removed":
        return "ticket", f"{body['version']} is no longer {body.get('alias')}", str(details.get("reason") or "")
    if change == "blocked":
        return "ticket", f"{body['version']} is blocked", str(details.get("reason") or details)
    return None


def _job(event: Event) -> Words | None:
    body = event.body
    named = f"{body['job']} {body['job_id']}"
    if body["state"] == "completed":
        return "success", f"{event.agent or 'training'}: {named} is done", f"dataset {body.get('dataset_id')}"
    if body.get("cause") == "HealthGateError":
        return "ticket", f"{event.agent or 'training'}: a health gate stopped {named}", body.get("reason") or ""
    return "ticket", f"{event.agent or 'training'}: {named} failed", body.get("reason") or ""


def _config(event: Event) -> Words | None:
    return "ticket", f"a deployment config was rejected ({event.body['source']})", event.body["reason"]


def _anomaly(event: Event) -> Words | None:
    body = event.body
    what = body["signal"].replace("_", " ")
    text = f"{body['value']:.3g}, stable {body['baseline']:.3g}, limit {body['limit']:.3g}, {body['requests']} requests"
    return "ticket", f"{event.agent}: {body['version']} is out of the ordinary ({what})", text


ALERTS: dict[str, tuple[Severity, str]] = {
    "drift": ("ticket", "grader and reward model have drifted apart"),
    "spool": ("ticket", "the event log took no interactions; they waited on disk"),
    "queue_full": ("ticket", "clients were turned away: the queue of the event log was full"),
    "capture_failed": ("ticket", "what records interactions failed, and goes on"),
    "interactions_lost": ("page", "interactions were lost"),
    "abstentions": ("ticket", "graders abstain too often"),
}
"""Name of an alert -> how urgent it is, and its words."""


def _alert(event: Event) -> Words | None:
    severity, words = ALERTS[event.body["name"]]
    return severity, f"{event.body['source']}: {words}", event.body["reason"]


WORDS: dict[str, Callable[[Event], Words | None]] = {
    "rollout.decision": _decision,
    "dataset.ready": _dataset,
    "model.updated": _model,
    "job.ended": _job,
    "config.rejected": _config,
    "anomaly.detected": _anomaly,
    "operator.alert": _alert,
}
FACTS = ("rollout_id", "experiment_id", "dataset_id", "version", "alias", "job_id", "outcome", "state", "change")


def notice(recorded: RecordedEvent) -> Notice | None:
    """What to say of an event; `None` where nobody needs to hear of it."""
    event = recorded.event
    words = WORDS.get(event.kind)
    said = None if words is None or recorded.erased else words(event)
    if said is None:
        return None
    severity, title, text = said
    facts: dict[str, Any] = {name: event.body[name] for name in FACTS if event.body.get(name) is not None}
    facts |= {"kind": event.kind, "tenant": event.tenant, "workspace": event.workspace, "seq": recorded.seq}
    return Notice(f"{event.tenant}/{event.event_id}", severity, title, text, event.occurred_at_us, facts)
