"""The events of the one append-only log: an envelope with ids and times, and a typed body a kind.

Bodies are validated once, where they enter (`parse_body`); inside the program they are plain dicts, as
they are stored. Adding a kind means adding a model to `BODIES`.
"""

import os
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.clock import now_us
from cluster.errors import InputError

Arm = Literal["stable", "candidate", "shadow", "none"]
Message = dict[str, Any]
"""An OpenAI chat message: `role`, `content`, and where they apply `tool_calls`, `tool_call_id`."""


Short = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Short | int | float | bool], Field(max_length=16)]
"""What a client may attach to an item: at most 16 short values."""


class Body(BaseModel):
    """Base of all bodies: unknown fields and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class InteractionFlags(Body):
    """What was unusual about an interaction."""

    fallback: bool = False
    """The candidate was assigned but stable answered."""
    shadow: bool = False
    """Nobody saw this answer."""
    disconnected: bool = False
    """The client went away before the end."""
    safety: bool = False
    timeout: bool = False
    error: str | None = None
    """OpenAI error code, when the request failed."""


class Interaction(Body):
    """One request and its response through the router."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    context: list[str] = []
    """Passages the answer may rest on."""
    response: Message | None = None
    finish_reason: str | None = None
    prompt_token_ids: list[int] = []
    completion_token_ids: list[int] = []
    completion_logprobs: list[float] = []
    """Natural-log probabilities as the engine produced them, one a completion token."""
    parameters: dict[str, Any] = {}
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
    route_revision: int | None = None
    latency_s: float = Field(0.0, ge=0)
    ttft_s: float | None = Field(None, ge=0)
    """Time to first token."""
    modality: str = "text"
    user_tier: str | None = None
    metadata: dict[str, str | int | float | bool] = {}
    trace_id: str | None = None
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
    modality: str | None = Field(None, max_length=16)
    user_tier: str | None = Field(None, max_length=64)
    metadata: Metadata | None = None


class Behaviour(Body):
    """Something a user did after an answer, from which implicit signals are computed."""

    action: Literal["message", "copy", "citation_click", "read", "leave", "session_end"]
    duration_s: float | None = Field(None, ge=0)
    """For `read`: how long; for the others: time since the answer."""
    text: str | None = Field(None, max_length=100_000)
    modality: str | None = Field(None, max_length=16)
    user_tier: str | None = Field(None, max_length=64)
    metadata: Metadata | None = None


class Outcome(Body):
    """What a product measures itself."""

    name: str = Field(min_length=1, max_length=64)
    value: float
    modality: str | None = Field(None, max_length=16)
    user_tier: str | None = Field(None, max_length=64)
    metadata: Metadata | None = None


class Trajectory(Body):
    """Several steps of an agent with tool calls, graded as a whole."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    reward: float | None = Field(None, ge=0, le=1)
    outcome: str | None = None
    metadata: dict[str, str | int | float | bool] = {}


class Grade(Body):
    """A grader's verdict on one interaction."""

    grader: str
    grader_version: str
    reward: float | None = Field(None, ge=0, le=1)
    """`None` means the grader abstained."""
    score_card: dict[str, float] = {}
    reason: str | None = None


class Label(Body):
    """A reviewer's judgement of one interaction; a later label by the same reviewer supersedes it."""

    reviewer: str
    scores: dict[str, float] = {}
    """success, helpfulness, tone, safety: each in [0, 1]."""
    corrected: str | None = None
    preferred: str | None = None
    """Interaction id of the preferred answer."""
    notes: str | None = None


class RouteChanged(Body):
    """A write to a row of `routes`, by whom, with the row before and after."""

    writer: str
    """`config`, `person:<name>` or `controller`."""
    reason: str | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any]
    revision: int


class ConfigRejected(Body):
    """A deployment config that was refused; the old state stays."""

    source: str
    reason: str


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
    evidence: dict[str, Any] = {}
    actor: str = "controller"


class DatasetReady(Body):
    """A dataset was written."""

    dataset_id: str
    dataset_hash: str
    path: str
    counts: dict[str, Any] = {}


class ModelUpdated(Body):
    """Something happened to a registered version."""

    version: str
    change: Literal["registered", "evaluated", "alias", "servable", "blocked"]
    alias: str | None = None
    adapter_sha256: str | None = None
    dataset_hash: str | None = None
    details: dict[str, Any] = {}


class Erasure(Body):
    """A person's data was removed; the tombstone refuses its return."""

    user_id: str
    affected: dict[str, Any] = {}


BODIES: dict[str, type[Body]] = {
    "interaction": Interaction,
    "feedback": Feedback,
    "behaviour": Behaviour,
    "outcome": Outcome,
    "trajectory": Trajectory,
    "grade": Grade,
    "label": Label,
    "route.changed": RouteChanged,
    "config.rejected": ConfigRejected,
    "rollout.decision": RolloutDecision,
    "dataset.ready": DatasetReady,
    "model.updated": ModelUpdated,
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
    """SHA-256 over salt, envelope and body; survives erasure."""
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


def uuid7() -> str:
    """A UUID version 7 (RFC 9562): 48 bits of milliseconds, then random bits; sorts by time."""
    random = int.from_bytes(os.urandom(10), "big")
    value = (time.time_ns() // 1_000_000) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
