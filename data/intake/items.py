"""One item from outside, an HTTP body's or a file's, becomes an event or an error that says why not.

An item is one flat object: the ids and times of the envelope beside the fields of the body, so
`{"interaction_id": "i1", "type": "thumbs_up", "user": "ada"}` is feedback. Tenant and workspace come from
the API key or the command's settings, never from the item; the user is replaced by a pseudonym here.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.clock import SECOND_US, from_iso
from cluster.errors import InputError
from cluster.settings import Settings
from data.events import OWN_NAMESPACES, Event, input_error, interaction_event_id, parse_body, uuid7
from data.feedback import complete_feedback, pseudonym, refuse_server_fields
from data.intake.messages import check_messages
from data.intake.metadata import scrubbed
from data.intake.plain import check_plain

Id = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x20\x7f]+$")]
"""An identifier: printable, without blanks, as long as its column."""


class Envelope(BaseModel):
    """The fields of an item that are not its body's."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    event_id: Id | None = None
    """Makes a retry a no-op; made by the server where absent."""
    interaction_id: Id | None = None
    user: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    session: Id | None = None
    agent: Id | None = None
    occurred_at: str | float | None = None
    """RFC 3339 text, or seconds since 1970; now where absent."""


ENVELOPE_FIELDS = frozenset(Envelope.model_fields)

NEEDS_INTERACTION = frozenset({"interaction", "feedback", "outcome"})

FROM_PEOPLE = frozenset({"interaction", "tool_call", "trajectory", "feedback", "behaviour", "outcome"})
"""Kinds that carry the tier of the user they come from."""


@dataclass(frozen=True, slots=True)
class Identity:
    """On whose behalf items come in: from the API key, or from a command's settings."""

    tenant: str
    workspace: str
    user_tier: str | None = None


@dataclass(frozen=True, slots=True)
class Parser:
    """Turns items into events."""

    settings: Settings
    secret: bytes
    """Key of the pseudonyms (`data.feedback.pseudonym_secret`)."""

    def parse(self, item: Any, kind: str, identity: Identity, now_us: int) -> Event:
        """The event of one item.

        Raises:
            InputError: names the field, its value and the rule it breaks.
        """
        if not isinstance(item, dict):
            raise InputError("item", item, "must be an object", f"send the fields of a {kind}")
        envelope = _envelope(item, kind)
        body = {name: value for name, value in item.items() if name not in ENVELOPE_FIELDS}
        return Event(
            kind=kind,
            tenant=identity.tenant,
            workspace=identity.workspace,
            body=self._body(kind, body, identity),
            event_id=envelope.event_id or _event_id(kind, envelope),
            occurred_at_us=self._occurred_at(envelope.occurred_at, now_us),
            user_id=None if envelope.user is None else pseudonym(self.secret, identity.tenant, envelope.user),
            session_id=envelope.session,
            agent=envelope.agent,
            interaction_id=envelope.interaction_id,
        )

    def _body(self, kind: str, body: dict[str, Any], identity: Identity) -> dict[str, Any]:
        if kind == "feedback":
            refuse_server_fields(body)
        parsed = parse_body(kind, body, strict=True)
        for name, value in parsed.items():
            check_plain(value, name, self.settings.intake.max_text_chars)
        if parsed.get("messages") is not None:
            _check_messages(parsed["messages"], may_be_empty=kind == "trajectory" and "span_id" in parsed)
        if identity.user_tier is not None and kind in FROM_PEOPLE:
            parsed.setdefault("user_tier", identity.user_tier)
        if parsed.get("metadata"):
            parsed["metadata"] = scrubbed(parsed["metadata"])
        return complete_feedback(parsed, self.settings.rewards) if kind == "feedback" else parsed

    def _occurred_at(self, value: str | float | None, now_us: int) -> int:
        if value is None:
            return now_us
        try:
            at_us = from_iso(value) if isinstance(value, str) else round(value * SECOND_US)
        except (ValueError, OverflowError):
            rule = "must be an RFC 3339 time or seconds since 1970"
            raise InputError("occurred_at", value, rule, "for example 2026-01-31T12:00:00Z") from None
        if at_us < 0:
            raise InputError("occurred_at", value, "must not lie before 1970", "send the time of the event")
        if at_us > now_us + self.settings.intake.future_tolerance_s * SECOND_US:
            raise InputError("occurred_at", value, "must not lie in the future", "set the sender's clock")
        return at_us


def _envelope(item: dict[str, Any], kind: str) -> Envelope:
    try:
        envelope = Envelope.model_validate({k: v for k, v in item.items() if k in ENVELOPE_FIELDS})
    except ValidationError as error:
        raise input_error(error, f"see the fields of a {kind}") from None
    refuse_own_id(envelope.event_id)
    if kind in NEEDS_INTERACTION and envelope.interaction_id is None:
        raise InputError("interaction_id", None, "is missing", "send the id of the answer it is about")
    if kind == "behaviour" and envelope.interaction_id is None and envelope.session is None:
        raise InputError("interaction_id", None, "or session must be given", "say what it is about")
    return envelope


def refuse_own_id(event_id: str | None) -> None:
    """Raise `InputError` where a sender's id is one that only Rayloop gives: it would displace our event."""
    if event_id is not None and event_id.startswith(OWN_NAMESPACES):
        raise InputError("event_id", event_id, "is an id that only Rayloop gives", "choose another")


def _event_id(kind: str, envelope: Envelope) -> str:
    if kind == "interaction" and envelope.interaction_id is not None:
        return interaction_event_id(envelope.interaction_id)
    return uuid7()


def _check_messages(messages: list[dict[str, Any]], *, may_be_empty: bool) -> None:
    """`may_be_empty`: an agent's span, whose steps came in other requests of its trace."""
    if not messages and not may_be_empty:
        raise InputError("messages", messages, "must not be empty", "send the conversation")
    check_messages(messages)
