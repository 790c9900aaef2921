"""Batches from outside into the log: each item is accepted, a duplicate, or rejected with the reason.

Knows nothing of HTTP. A web route reads its body with `read_items`, calls `Intake.take_in` and sends back
`ItemResult.as_dict`; when the call returns, what it says was accepted is on disk.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from cluster.clock import now_us
from cluster.errors import ConflictError, ErasedError, InputError
from cluster.settings import Settings
from data.events import Event
from data.feedback import EXPLICIT, pseudonym_secret
from data.group_commit import GroupCommit
from data.intake.items import Identity, Parser
from data.interaction_bodies import ASSIGNMENT_FIELDS
from data.log import Verdict

KINDS = ("feedback", "behaviour", "outcome", "trajectory", "interaction", "tool_call")
"""Kinds of event that clients may send."""

TRACE_KINDS = ("interaction", "tool_call", "trajectory")
"""Kinds that an item of a trace may name; the first where it names none."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What became of one item."""

    event_id: str | None
    """`None` where the item was rejected and carried no id."""
    status: Literal["accepted", "duplicate", "rejected"]
    error: InputError | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the response: OpenAI's error object where the item was rejected."""
        shown: dict[str, Any] = {"event_id": self.event_id, "status": self.status}
        if self.error is not None:
            erased = isinstance(self.error, ErasedError)
            shown["error"] = {
                "message": str(self.error),
                "type": "permission_error" if erased else "invalid_request_error",
                "param": self.error.field,
                "code": "user_erased" if erased else "invalid_value",
            }
        return shown


@dataclass(frozen=True, slots=True)
class Prepared:
    """A parsed batch: the events to append, and what each item came to."""

    events: list[Event]
    results: list[ItemResult | None]
    """In the order of the items; `None` waits for the log's verdict."""

    def finish(self, verdicts: Sequence[Verdict]) -> list[ItemResult]:
        """One result an item, given one verdict an event."""
        waiting = iter(verdicts)
        return [r or _result(next(waiting)) for r in self.results]


class Intake:
    """Takes items in on behalf of the clients of one process."""

    def __init__(self, commit: GroupCommit, settings: Settings) -> None:
        self.commit = commit
        self.settings = settings
        self._parser = Parser(settings, pseudonym_secret(settings))

    async def take_in(self, items: Sequence[Any], kind: str | None, identity: Identity) -> list[ItemResult]:
        """Parse, append and wait until durable; one result an item, in order.

        `kind` is what all items are; `None`: parts of traces, each of which names its own.

        Raises:
            ConflictError: the switch for this kind is off.
            OverloadedError: too many events wait already; nothing was taken.
            UnavailableError: the database stayed out of reach; sending again is safe with event ids.
        """
        prepared = self.prepare(items, kind, identity)
        verdicts: list[Verdict] = await asyncio.wrap_future(self.commit.submit(prepared.events))
        return prepared.finish(verdicts)

    def take_in_and_wait(self, items: Sequence[Any], kind: str | None, identity: Identity) -> list[ItemResult]:
        """`take_in` for callers without an event loop."""
        prepared = self.prepare(items, kind, identity)
        return prepared.finish(self.commit.append(prepared.events))

    def prepare(self, items: Sequence[Any], kind: str | None, identity: Identity) -> Prepared:
        """Parse every item; a bad one is rejected alone."""
        self._require_enabled(kind)
        prepared = Prepared([], [])
        at_us = now_us()
        for item in items:
            try:
                event = self._event(item, kind, identity, at_us)
            except InputError as error:
                prepared.results.append(ItemResult(_given_id(item), "rejected", error))
            else:
                prepared.events.append(event)
                prepared.results.append(None)
        return prepared

    def _event(self, item: Any, kind: str | None, identity: Identity, at_us: int) -> Event:
        if kind is None:
            kind, item = _kind_of(item)
        if kind == "interaction":
            refuse_assignment(item)
        event = self._parser.parse(item, kind, identity, at_us)
        self._require_type_enabled(event)
        return event

    def _require_enabled(self, kind: str | None) -> None:
        assert kind is None or kind in KINDS, f"{kind} does not come from clients"
        feedback = self.settings.feedback
        switches = {
            "learning.enabled": self.settings.learning.enabled,
            "capture.enabled": kind is not None or self.settings.capture.enabled,
            "feedback.explicit": kind != "feedback" or feedback.explicit or feedback.implicit,
            "feedback.implicit": kind != "behaviour" or feedback.implicit,
            "trajectory_evaluation.enabled": kind != "trajectory" or self.settings.trajectory_evaluation.enabled,
        }
        for name, on in switches.items():
            if not on:
                what = kind or "a trace"
                raise ConflictError(f"{name}=false: {what} is not taken; set `{name}: true` in rayloop.yaml")

    def _require_type_enabled(self, event: Event) -> None:
        if event.kind == "trajectory" and not self.settings.trajectory_evaluation.enabled:
            remedy = "set `trajectory_evaluation.enabled: true` in rayloop.yaml"
            raise InputError("kind", event.kind, "is not taken while trajectory_evaluation is off", remedy)
        if event.kind != "feedback":
            return
        name = "explicit" if event.body["type"] in EXPLICIT else "implicit"
        if not getattr(self.settings.feedback, name):
            remedy = f"set `feedback.{name}: true` in rayloop.yaml"
            raise InputError("type", event.body["type"], f"is not taken while feedback.{name} is off", remedy)


def _kind_of(item: Any) -> tuple[str, Any]:
    """The kind that an item of a trace names, and the item without it."""
    if not isinstance(item, dict):
        return TRACE_KINDS[0], item
    kind = item.get("kind", TRACE_KINDS[0])
    if kind not in TRACE_KINDS:
        raise InputError("kind", kind, f"must be one of {', '.join(TRACE_KINDS)}", "name what the item is")
    return kind, {name: value for name, value in item.items() if name != "kind"}


def refuse_assignment(item: Any) -> None:
    """Raise `InputError` where a client sets what only the router may: experiments are counted by it."""
    for name in ASSIGNMENT_FIELDS:
        if isinstance(item, dict) and name in item:
            raise InputError(name, item[name], "is set by the router", "leave it out")


def read_document(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    NaN and infinities, which are no JSON, pass here: they are refused item by item, and the others are kept.

    Raises:
        InputError: it is not JSON, or no object.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        document = _with_nan(body)
        if document is None:
            raise InputError("body", body[:80], f"is not valid JSON ({error})", "send UTF-8 JSON") from None
    if not isinstance(document, dict):
        raise InputError("body", document, "must be an object", 'send one item or {"items": [...]}')
    return document


def _with_nan(body: bytes) -> Any:
    """What a body holds that is JSON but for numbers that are none; `None` where it is not even that."""
    try:
        document = json.loads(body.decode())
        json.dumps(document, ensure_ascii=False).encode()  # halves of a surrogate pair cannot be written down
    except (ValueError, RecursionError):
        return None
    return document


def items_in(document: dict[str, Any], settings: Settings) -> list[Any]:
    """The items of a request: one object, or `{"items": [...]}`.

    Raises:
        InputError: more items than a body may hold, or something beside them.
    """
    if "items" not in document:
        return [document]
    items, limit = document["items"], settings.intake.max_items
    if not isinstance(items, list) or len(document) > 1:
        raise InputError("items", items, "must be a list, and the only field", 'send {"items": [...]}')
    if len(items) > limit:
        raise InputError("items", len(items), f"items are more than {limit}", "send several bodies")
    return items


def read_items(body: bytes, settings: Settings) -> list[Any]:
    """`items_in` of the body's document."""
    return items_in(read_document(body), settings)


def _result(verdict: Verdict) -> ItemResult:
    if verdict.status == "refused":
        return ItemResult(verdict.event_id, "rejected", ErasedError(verdict.event_id))
    return ItemResult(verdict.event_id, verdict.status)


def _given_id(item: Any) -> str | None:
    given = item.get("event_id") if isinstance(item, dict) else None
    return given if isinstance(given, str) else None
