"""Asking people about answers, and reading what they said.

Whoever wants people's judgement writes `label.requested` events (`request_labels`); the queue that reviewers see is
a projection of them (`data.labelling.queue`); what came of a request is read with `labels_for`. The versions behind the
answers are in the event and are shown to nobody who judges.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.events import Event, chosen_reports, parse_body
from data.interaction_bodies import Message
from data.label_bodies import Reason
from data.log import EventLog
from data.template import content_text

REQUESTED, LABEL, SKIPPED = "label.requested", "label", "label.skipped"


@dataclass(frozen=True, slots=True)
class AnswerToLabel:
    """One answer to be judged: an interaction of the log, or a message that the log does not have."""

    version: str
    message: Message | None = None
    interaction_id: str | None = None


@dataclass(frozen=True, slots=True)
class LabelRequest:
    """One answer, or two to the same prompt, for people to judge.

    Answers that are no interactions (an evaluation's) never become training examples: their labels name none.
    """

    request_id: str
    """Chosen by the asker; asking again under it changes nothing."""
    tenant: str
    workspace: str
    reason: Reason
    answers: tuple[AnswerToLabel, ...]
    messages: tuple[Message, ...] = ()
    """The prompt; empty where the answers are interactions."""
    agent: str | None = None
    user_id: str | None = None
    """Pseudonym of the person whose data this is: an erasure takes it away."""
    interaction_id: str | None = None
    """The interaction the prompt comes from, where there is one; an erasure takes this away with it."""
    reviewers: int = 1
    """How many people are to judge it, each on their own."""

    def event(self) -> Event:
        """As it is written into the log.

        Raises:
            InputError: a field that breaks its rule.
        """
        answers = [
            {"version": a.version, "message": a.message, "interaction_id": a.interaction_id} for a in self.answers
        ]
        body = {
            "reason": self.reason,
            "answers": [{k: v for k, v in answer.items() if v is not None} for answer in answers],
            "messages": list(self.messages),
            "reviewers": self.reviewers,
        }
        source = self.interaction_id or next((a.interaction_id for a in self.answers if a.interaction_id), None)
        return Event(
            REQUESTED, self.tenant, self.workspace, parse_body(REQUESTED, body),
            event_id=request_event_id(self.request_id), user_id=self.user_id, agent=self.agent, interaction_id=source,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one reviewer said about one request, newest word only."""

    reviewer: str
    preferred: int | None
    """Place of the preferred answer among the request's; `None`: one answer only, or none is better."""
    scores: tuple[Mapping[str, float], ...]
    """success, helpfulness, tone, safety in [0, 1], of each answer of the request in its order."""
    corrected: str | None
    notes: str | None
    at_us: int


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """Two answers to one prompt, and which of them people found better."""

    item_id: str
    messages: tuple[Message, ...]
    preferred: str
    other: str
    user_id: str | None
    """Whose prompt it is."""


def request_labels(event_log: EventLog, requests: Sequence[LabelRequest]) -> None:
    """Put requests into the queue; durable when this returns, and a no-op for those that are there already.

    Raises:
        InputError: a request that breaks a rule; none of them is written.
    """
    event_log.append([request.event() for request in requests])


def labels_for(event_log: EventLog, tenant: str, request_ids: Iterable[str]) -> dict[str, list[Judgement]]:
    """What people said about these requests: for each request one judgement a reviewer, in order of their names.

    A request that nobody has judged (or only skipped) has an empty list, and so has one that is unknown or erased.
    """
    wanted = {item_id(tenant, request_event_id(request_id)): request_id for request_id in request_ids}
    asked, labels = _requests_and_labels(event_log, tenant)
    names = {item: answer_names(item, asked[item].body["answers"]) for item in wanted if item in asked}
    return {request: _judgements(names.get(item, []), labels.get(item, [])) for item, request in wanted.items()}


def judged_pairs(event_log: EventLog, tenant: str, *, agent: str, since_us: int) -> list[JudgedPair]:
    """Pairs of answers of which most reviewers preferred one, by requests since then.

    Answers that are interactions are read from the log; a pair is left out where it no longer has them.
    """
    asked, labels = _requests_and_labels(event_log, tenant)
    votes = {
        item: _votes(item, event, labels.get(item, []))
        for item, event in asked.items()
        if event.agent == agent and event.occurred_at_us >= since_us and len(event.body["answers"]) == 2
    }
    decided = {item: asked[item] for item, vote in votes.items() if vote}
    given = _interactions(event_log, tenant, decided.values())
    pairs = (_judged_pair(item, event, votes[item], given) for item, event in decided.items())
    return [pair for pair in pairs if pair is not None]


def _votes(item: str, event: Event, labels: Sequence[Event]) -> int:
    """By how many reviewers more the first of two answers is preferred."""
    said = _judgements(answer_names(item, event.body["answers"]), labels)
    return sum({None: 0, 0: 1, 1: -1}[one.preferred] for one in said)


def _interactions(event_log: EventLog, tenant: str, asked: Iterable[Event]) -> dict[str, Event]:
    """The interactions that requests ask about, by id."""
    ids = {
        answer["interaction_id"] for event in asked for answer in event.body["answers"] if "interaction_id" in answer
    }
    reports = chosen_reports(event_log.about(tenant, sorted(ids), kinds=("interaction",)))
    return {str(r.event.interaction_id): r.event for r in reports if not r.erased}


def _judged_pair(item: str, event: Event, votes: int, given: Mapping[str, Event]) -> JudgedPair | None:
    """The pair behind a request; `None` where an answer is gone or has no text."""
    messages: list[Message] = list(event.body["messages"])
    texts = []
    for answer in event.body["answers"]:
        told = given.get(answer.get("interaction_id", ""))
        message = answer.get("message") or (told.body.get("response") if told else None) or {}
        texts.append(content_text(message))
        messages = messages or (told.body["messages"] if told else [])
    if not all(texts) or not messages:
        return None
    first, second = texts if votes > 0 else texts[::-1]
    return JudgedPair(item, tuple(messages), first, second, event.user_id)


def _requests_and_labels(event_log: EventLog, tenant: str) -> tuple[dict[str, Event], dict[str, list[Event]]]:
    """Each item's request and its labels; what is erased is left out."""
    asked: dict[str, Event] = {}
    labels: dict[str, list[Event]] = {}
    for recorded in event_log.scan(kinds=(REQUESTED, LABEL), tenant=tenant):
        event = recorded.event
        if recorded.erased:
            continue
        if event.kind == REQUESTED:
            asked[item_id(tenant, event.event_id)] = event
        elif (item := event.body.get("item_id")) is not None:
            labels.setdefault(item, []).append(event)
    return asked, labels


def _judgements(names: Sequence[str], labels: Sequence[Event]) -> list[Judgement]:
    newest: dict[str, dict[str, Event]] = {}
    for event in sorted(labels, key=lambda e: (e.occurred_at_us, e.event_id)):
        about: str = event.body.get("answer") or event.interaction_id or ""
        if about in names:
            newest.setdefault(event.body["reviewer"], {})[about] = event
    return [_judgement(reviewer, names, newest[reviewer]) for reviewer in sorted(newest)]


def _judgement(reviewer: str, names: Sequence[str], said: Mapping[str, Event]) -> Judgement:
    last = max(said.values(), key=lambda e: (e.occurred_at_us, e.event_id))
    preferred = last.body.get("preferred")
    return Judgement(
        reviewer,
        names.index(preferred) if len(names) > 1 and preferred in names else None,
        tuple(dict(said[name].body.get("scores") or {}) if name in said else {} for name in names),
        last.body.get("corrected"),
        last.body.get("notes"),
        last.occurred_at_us,
    )


def request_event_id(request_id: str) -> str:
    """The id of the event of a request: by it a repeated request is recognised."""
    return f"label:{hashlib.sha256(request_id.encode()).hexdigest()}"


def item_id(tenant: str, event_id: str) -> str:
    """Under which name reviewers know the item of an event; it tells nothing of where the item comes from."""
    return hashlib.sha256(f"{tenant}\0{event_id}".encode()).hexdigest()[:32]


def answer_names(item: str, answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What labels call the answers of an item: the interaction, or the item and the answer's place."""
    return [answer.get("interaction_id") or answer_name(item, place) for place, answer in enumerate(answers)]


def answer_name(item: str, place: int) -> str:
    """What labels call an answer that is no interaction."""
    return f"{item}/{place}"


def is_flipped(item: str) -> bool:
    """Whether the second of two answers is shown first: so in half of the items, and always the same ones."""
    return int(item[-1], 16) % 2 == 1
