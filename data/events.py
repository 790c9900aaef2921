"""The events of the one append-only log: an envelope with ids and times, and a typed body a kind.

Bodies are validated once, where they enter (`parse_body`); inside the program they are plain dicts, as
they are stored. Adding a kind means adding a model to `BODIES`.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.clock import now_us
from cluster.errors import InputError
from data.event_body import Body
from data.interaction_bodies import Interaction, ToolCall, Trajectory
from data.label_bodies import Label, LabelRequested, LabelSkipped
from data.operation_bodies import (
    AnomalyDetected,
    ConfigRejected,
    DatasetReady,
    Erasure,
    JobEnded,
    ModelUpdated,
    OperatorAlert,
    PartitionSealed,
    PromptChanged,
    RolloutDecision,
    RouteChanged,
    ShadowPair,
)
from data.reaction_bodies import Behaviour, Feedback, Grade, Outcome

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


def judges(grade: dict[str, Any], report_id: str) -> bool:
    """Whether a grade's body is about the answer that this report of the interaction tells of, as far as it says."""
    return grade.get("judged") in (None, report_id)


def uuid7() -> str:
    """A UUID version 7 (RFC 9562): 48 bits of milliseconds, then random bits; sorts by time."""
    random = int.from_bytes(os.urandom(10), "big")
    value = (time.time_ns() // 1_000_000) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
