"""The events of the one append-only log: an envelope with ids and times, and a typed body a kind.

Bodies are validated once, where they enter (`parse_body`); inside the program they are plain dicts, as
they are stored. Adding a kind means adding a model to `BODIES`.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from cluster.clock import now_us
from cluster.errors import InputError
from data.event_body import Body
from data.label_bodies import Label, LabelRequested, LabelSkipped

Arm = Literal["stable", "candidate", "shadow", "none"]
Message = dict[str, Any]
"""An OpenAI chat message: `role`, `content`, and where they apply `tool_calls`, `tool_call_id`."""


Short = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Short | int | float | bool], Field(max_length=16)]
"""What a client may attach to an item: at most 16 short values."""
Modality = Annotated[str, Field(min_length=1, max_length=16)]
"""`text`, `voice`, `sms`, or a word of your own; routes are keyed by it."""
Tier = Annotated[str, Field(min_length=1, max_length=64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SpanId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Of the OpenTelemetry span an item was made from. `parent_span_id` names the nearest span above it that is an item
too, else the last one known: by these the parts of a trace find each other (`data.traces.join`)."""


class ToolCall(Body):
    """One call of a tool by an agent, and what came of it."""

    name: str = Field(min_length=1, max_length=256)
    call_id: str | None = Field(None, max_length=256)
    """As in the assistant's message: `tool_calls[].id`."""
    arguments: dict[str, Any] | str | None = None
    """The object; text where the model wrote something that is no object."""
    result: Any = None
    """Whatever the tool answered, as JSON."""
    error: str | None = Field(None, max_length=2_000)
    """What went wrong, where something did."""
    latency_s: float | None = Field(None, ge=0)
    trace_id: str | None = Field(None, max_length=64)
    span_id: SpanId | None = None
    parent_span_id: SpanId | None = None
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class InteractionFlags(Body):
    """What was unusual about an interaction."""

    fallback: bool = False
    """The candidate was assigned but stable answered."""
    shadow: bool = False
    """Nobody saw this answer."""
    disconnected: bool = False
    """The client went away before the end."""
    safety: bool = False
    """A filter stopped the answer. That the model refused is in its `refusal`."""
    quality: bool = False
    """The answer is empty, or was cut off at its limit of tokens."""
    timeout: bool = False
    error: str | None = None
    """OpenAI error code, when the request failed."""
    rejected: str | None = None
    """OpenAI error code, when the request was turned down for what it asks or for want of room: nobody's failure."""


ASSIGNMENT_FIELDS = (
    "assigned_version",
    "adapter_digest",
    "arm",
    "experiment_id",
    "propensity",
    "bucket",
    "assignment_unit",
    "split",
    "route_revision",
    "prompt_digest",
)
"""Fields of an interaction that only the router may fill in: experiments are counted by them."""


class Interaction(Body):
    """One request and its response, through the router or as an agent elsewhere reports it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] = Field([])
    """Calls made for this answer, where the reporter knows them; others come as events of their own."""
    context: list[str] = Field([])
    """Passages the answer may rest on."""
    response: Message | None = None
    finish_reason: str | None = None
    prompt_token_ids: list[TokenId] = Field([])
    completion_token_ids: list[TokenId] = Field([])
    completion_logprobs: list[float] = Field([])
    """Natural-log probabilities as the engine produced them, one a completion token."""
    parameters: dict[str, Any] = Field({})
    """Sampling parameters of the request: temperature, max_tokens, …"""
    requested: str = ""
    """The `model` the client asked for: an agent or a version."""
    assigned_version: str | None = None
    served_version: str | None = None
    adapter_digest: str | None = None
    arm: Arm = "none"
    """The arm assigned, which is the arm all analysis goes by."""
    experiment_id: str | None = None
    propensity: float | None = Field(None, gt=0, le=1)
    """Probability of the assigned arm."""
    bucket: float | None = Field(None, ge=0, lt=1)
    assignment_unit: Literal["user", "session", "request"] | None = None
    split: list[tuple[str | None, float, float]] | None = None
    """Experiment, start and share of every candidate in force, where there are several; `propensity` tells of one."""
    route_revision: int | None = None
    prompt_digest: Digest | None = None
    """Of the agent's prompt (`data.prompt`) that `messages` begin with."""
    latency_s: float = Field(0.0, ge=0)
    ttft_s: float | None = Field(None, ge=0)
    """Time to first token."""
    modality: Modality = "text"
    user_tier: Tier | None = None
    metadata: Metadata = Field({})
    trace_id: str | None = Field(None, max_length=64)
    span_id: SpanId | None = None
    parent_span_id: SpanId | None = None
    flags: InteractionFlags = InteractionFlags()


FeedbackType = Literal[
    "thumbs_up",
    "thumbs_down",
    "rating",
    "correction",
    "follow_up",
    "abandonment",
    "draft_approved",
    "draft_rejected",
    "reformulation",
    "quick_accept",
    "copy_response",
    "citation_click",
    "thorough_read",
    "abuse_flag",
    "policy_violation",
    "compliance_flag",
]


class Feedback(Body):
    """One signal about one interaction."""

    type: FeedbackType
    value: float | None = None
    """The rating, 1 to 5, where `type` is `rating`."""
    text: str | None = Field(None, max_length=100_000)
    """The better answer, where `type` is `correction`; else a comment."""
    category: Literal["factual", "style", "tone"] | None = None
    source: Literal["explicit", "implicit"] = "explicit"
    reward: float = Field(0.0, ge=-1, le=1)
    """Filled in by the server from the configured table, never by the client."""
    reason: str | None = Field(None, max_length=2_000)
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class Behaviour(Body):
    """Something a user did after an answer, from which implicit signals are computed."""

    action: Literal["message", "copy", "citation_click", "read", "leave", "session_end"]
    duration_s: float | None = Field(None, ge=0)
    """For `read`: how long; for the others: time since the answer."""
    text: str | None = Field(None, max_length=100_000)
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class Outcome(Body):
    """What a product measures itself."""

    name: str = Field(min_length=1, max_length=64)
    value: float
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class Trajectory(Body):
    """Several steps of an agent with tool calls, graded as a whole."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] = Field([])
    """Arguments, results, latency and errors of the calls, in order, where the reporter knows them."""
    reward: float | None = Field(None, ge=0, le=1)
    outcome: str | None = Field(None, max_length=512)
    latency_s: float | None = Field(None, ge=0)
    trace_id: str | None = Field(None, max_length=64)
    span_id: SpanId | None = None
    parent_span_id: SpanId | None = None
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata = Field({})


class Grade(Body):
    """A grader's verdict on one interaction."""

    grader: str
    grader_version: str
    reward: float | None = Field(None, ge=0, le=1)
    """`None` means the grader abstained."""
    score_card: dict[str, float] = Field({})
    reason: str | None = None


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


BODIES: dict[str, type[Body]] = {
    "interaction": Interaction,
    "feedback": Feedback,
    "behaviour": Behaviour,
    "outcome": Outcome,
    "tool_call": ToolCall,
    "trajectory": Trajectory,
    "grade": Grade,
    "label": Label,
    "label.requested": LabelRequested,
    "label.skipped": LabelSkipped,
    "route.changed": RouteChanged,
    "prompt.changed": PromptChanged,
    "shadow.pair": ShadowPair,
    "anomaly.detected": AnomalyDetected,
    "config.rejected": ConfigRejected,
    "rollout.decision": RolloutDecision,
    "dataset.ready": DatasetReady,
    "model.updated": ModelUpdated,
    "job.ended": JobEnded,
    "operator.alert": OperatorAlert,
    "partition.sealed": PartitionSealed,
    "erasure": Erasure,
}


@dataclass(frozen=True, slots=True)
class Event:
    """One fact: who, when, about what, and its body.

    `user_id` is a pseudonym wherever the event came from outside (`data.feedback.pseudonym`).
    """

    kind: str
    tenant: str
    workspace: str
    body: dict[str, Any]
    event_id: str = field(default_factory=lambda: uuid7())
    occurred_at_us: int = field(default_factory=now_us)
    user_id: str | None = None
    session_id: str | None = None
    agent: str | None = None
    interaction_id: str | None = None


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event as the log holds it."""

    seq: int
    event: Event
    recorded_at_us: int
    digest: bytes
    """SHA-256 over envelope and salted body (`data.encoding.event_digest`); survives erasure."""
    erased: bool = False
    """True when the body is gone; `event.body` is then empty."""


def parse_body(kind: str, body: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """The body of `kind`, validated, with defaults filled in. `strict`: `"5"` is no number.

    Raises:
        InputError: an unknown kind, or a field that breaks its rule.
    """
    model = BODIES.get(kind)
    if model is None:
        raise InputError("kind", kind, f"must be one of {', '.join(BODIES)}", "name a known kind")
    try:
        parsed = model.model_validate(body, strict=strict)
    except ValidationError as error:
        raise input_error(error, f"see the fields of `{kind}`") from None
    return {name: _plain(value) for name, value in parsed.__dict__.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return [_plain(item) for item in value]
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


UNION_BRANCHES = {("str",), ("constrained-str",), ("int",), ("float",), ("bool",)}
"""What pydantic appends to the place of an error for a field of several types."""


def input_error(error: ValidationError, remedy: str) -> InputError:
    """The first broken rule of a pydantic error, as field, value and rule."""
    problem = error.errors(include_url=False)[0]
    place = problem["loc"][:-1] if problem["loc"][-1:] in UNION_BRANCHES else problem["loc"]
    name = ".".join(map(str, place))
    rule = problem["msg"].replace("Input should be", "must be").replace("Extra inputs are", "unknown field is")
    return InputError(name or "item", problem["input"], rule[0].lower() + rule[1:], remedy)


ROUTER = "router:"
OWN_NAMESPACES = (
    ROUTER, "alert:", "anomaly-", "dataset.ready:", "erasure:", "grade:", "job:", "needs-retraining:",
    "partition.sealed:", "rollout:",
)  # fmt: skip
"""How ids of events begin that only Rayloop writes: whoever took one first would displace the event."""


def interaction_event_id(interaction_id: str, namespace: str = "interaction:") -> str:
    """The event id of an interaction whose sender gave none; the router's are in a namespace of its own.

    The router and an instrumented agent may both report one answer: `from_router` tells whose word counts.
    """
    if len(interaction_id) <= 100:
        return f"{namespace}{interaction_id}"
    return f"{namespace}{hashlib.sha256(interaction_id.encode()).hexdigest()}"


def from_router(event_id: str) -> bool:
    """Whether an interaction was recorded by the router that served it, and not reported by a client."""
    return event_id.startswith(ROUTER)


def routers_report(event: "Event") -> str | None:
    """Id of the router's event about the same answer, where this is somebody else's report of one."""
    if event.kind != "interaction" or event.interaction_id is None or from_router(event.event_id):
        return None
    return interaction_event_id(event.interaction_id, ROUTER)


def chosen_reports(reports: Iterable["RecordedEvent"]) -> list["RecordedEvent"]:
    """Of several reports of one interaction the router's, else the first; one for each, in the order of the log."""
    ordered = sorted(reports, key=lambda r: (not from_router(r.event.event_id), r.seq))
    first = {(r.event.tenant, r.event.interaction_id): r for r in reversed(ordered)}
    return sorted(first.values(), key=lambda r: r.seq)


def uuid7() -> str:
    """A UUID version 7 (RFC 9562): 48 bits of milliseconds, then random bits; sorts by time."""
    random = int.from_bytes(os.urandom(10), "big")
    value = (time.time_ns() // 1_000_000) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
