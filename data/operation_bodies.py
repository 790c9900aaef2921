"""The bodies of what Rayloop did and saw itself: routes, rollouts, datasets, versions, jobs, alerts, erasures."""

from typing import Any, Literal

from pydantic import Field

from data.event_body import Body
from data.item_fields import Digest


class RouteChanged(Body):
    """A write to a row of `routes`, by whom, with the row before and after."""

    writer: str
    """`config`, `person:<name>` or `controller`."""
    reason: str | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any]
    revision: int


class PromptChanged(Body):
    """An agent has another prompt; the event is about the agent."""

    number: int = Field(ge=1)
    digest: Digest
    system: str
    refusals: list[dict[str, Any]] = Field([])
    """What must be refused: `rule`, and `cases` that evaluation asks."""
    writer: str


class ConfigRejected(Body):
    """A deployment config that was refused; the old state stays."""

    source: str
    reason: str


class ShadowPair(Body):
    """A live answer and the answer of a version that nobody saw, to the same request.

    The event is about the live interaction; the other one is an interaction too, with the arm `shadow`.
    """

    shadow_interaction_id: str
    live_version: str
    shadow_version: str
    agreement: float = Field(ge=0, le=1)
    """1: the same answer (see `serve.shadow.agreement`)."""
    for_review: bool = False
    """They disagree and were drawn for people to label."""


class AnomalyDetected(Body):
    """A version's live behaviour left the ordinary."""

    version: str
    signal: Literal["latency", "errors", "tool_errors", "safety"]
    value: float
    """p95 in seconds for `latency`, else a share."""
    baseline: float
    """The same of stable; for stable itself, of its requests before."""
    limit: float
    requests: int
    """How many the value rests on."""
    experiment_id: str | None = None


class RolloutDecision(Body):
    """A decision of the rollout controller with the evidence it rests on (aggregates only)."""

    rollout_id: str
    experiment_id: str
    number: int
    """1, 2, … within the rollout; `(rollout_id, number)` is decided once."""
    outcome: str
    """`start`, `advance`, `hold`, `await_approval`, `promote`, `rollback`, `freeze`, `fail`."""
    reason: str
    from_state: str
    to_state: str
    from_stage: int
    to_stage: int
    share_before: float
    share_after: float
    evidence: dict[str, Any] = Field({})
    actor: str = "controller"


class DatasetReady(Body):
    """A dataset was written."""

    dataset_id: str
    dataset_hash: str
    path: str
    counts: dict[str, Any] = Field({})


class ModelUpdated(Body):
    """Something happened to a registered version."""

    version: str
    change: Literal["registered", "evaluated", "alias", "alias_removed", "servable", "blocked"]
    alias: str | None = None
    adapter_sha256: str | None = None
    dataset_hash: str | None = None
    details: dict[str, Any] = Field({})


class JobEnded(Body):
    """A training job came to its end."""

    job_id: str
    job: str
    """`sft`, `dpo`, `kto`, …"""
    state: Literal["completed", "failed"]
    dataset_id: str | None = None
    reason: str | None = None
    """Why it failed."""
    cause: str | None = None
    """Name of the error: `HealthGateError` where a health gate stopped it."""


class OperatorAlert(Body):
    """Something that people who run this should look at, which is nobody's decision."""

    name: Literal["drift", "spool", "queue_full", "interactions_lost", "capture_failed", "abstentions"]
    source: str
    """Where it was seen: host and process, or a version."""
    reason: str
    facts: dict[str, Any] = Field({})


class PartitionSealed(Body):
    """Events of a finished day were written to Parquet."""

    day: str
    after_seq: int
    upto_seq: int
    """The partition holds the events of the day with `after_seq < seq <= upto_seq`."""
    num_events: int
    root: str
    """RFC 6962 Merkle root over their digests, in order of `seq`, hexadecimal."""
    sha256: str
    """Of the file as first written; an erasure writes another."""


class Erasure(Body):
    """A person's data was removed; the tombstone refuses its return."""

    user_id: str
    events: list[list[int]] = Field([])
    """`[first, last]` ranges of the `seq` that were erased."""
    affected: dict[str, Any] = Field({})
    """Counts, and the names of the datasets, versions and exports that contained the person."""
