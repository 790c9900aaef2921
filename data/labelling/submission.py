"""What a reviewer sends about an item becomes events: a label for each answer of the item, or a skip."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InputError, NotFoundError
from data.events import Event, input_error, parse_body, uuid7
from data.intake.items import Identity, refuse_own_id
from data.intake.plain import check_plain
from data.label_bodies import Complexity, ItemId, Reviewer, Scores
from data.labelling.content import places
from data.labelling.queue import Item, LabelQueue
from data.labelling.requests import LABEL, SKIPPED

Letter = Literal["a", "b"]
TIE = "tie"


class LabelItem(BaseModel):
    """A reviewer's judgement of one item of the queue, or their passing it over."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    event_id: Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[^\x00-\x20\x7f]+$")] | None = None
    """Makes a retry a no-op; made by the server where absent."""
    item_id: ItemId
    reviewer: Reviewer | None = None
    """Who judges; the key's name where absent."""
    skip: bool = False
    """Pass it over; only `notes` may say more."""
    preferred: Literal["a", "b", "tie"] | None = None
    """Of two answers the better one."""
    scores: dict[Letter, Scores] = Field({})
    """success, helpfulness, tone, safety, each in [0, 1], of the answers."""
    corrected: str | None = Field(None, min_length=1, max_length=100_000)
    """What the answer should have been."""
    task_category: str | None = Field(None, min_length=1, max_length=64)
    complexity: Complexity | None = None
    notes: str | None = Field(None, min_length=1, max_length=2_000)


@dataclass(frozen=True, slots=True)
class LabelParser:
    """Turns what reviewers send into events."""

    queue: LabelQueue
    max_text_chars: int

    def parse(self, given: Any, identity: Identity, reviewer: str) -> list[Event]:
        """The events of one submission; the first has its `event_id`. `reviewer` is who it is unless it says so.

        Raises:
            InputError: names the field, its value and the rule it breaks.
        """
        submission = _read(given, self.max_text_chars)
        try:
            item = self.queue.get(identity.tenant, identity.workspace, submission.item_id)
        except NotFoundError as error:
            raise InputError("item_id", submission.item_id, str(error), "see GET /v1/labels/queue") from None
        who = submission.reviewer or reviewer
        event_id = submission.event_id or uuid7()
        if submission.skip:
            _check_skip(submission)
            return [
                _event(SKIPPED, item, event_id, {"reviewer": who, "item_id": item.item_id, "notes": submission.notes})
            ]
        _check_label(submission, item)
        return _labels(submission, item, who, event_id)


def _read(given: Any, max_text_chars: int) -> LabelItem:
    if not isinstance(given, dict):
        raise InputError("item", given, "must be an object", "send the fields of a label")
    for name, value in given.items():
        check_plain(value, str(name), max_text_chars)
    try:
        item = LabelItem.model_validate(given)
    except ValidationError as error:
        raise input_error(error, "see the fields of a label") from None
    refuse_own_id(item.event_id)
    return item


def _check_skip(submission: LabelItem) -> None:
    for name in ("preferred", "scores", "corrected", "task_category", "complexity"):
        if value := getattr(submission, name):
            raise InputError(name, value, "does not belong to a skip", "leave it out, or leave skip out")


def _check_label(submission: LabelItem, item: Item) -> None:
    letters = places(item)
    if len(letters) == 1 and submission.preferred is not None:
        raise InputError("preferred", submission.preferred, "needs two answers to choose from", "leave it out")
    if len(letters) == 2 and submission.preferred is None:
        raise InputError("preferred", None, "is missing", "say a, b or tie")
    for letter in submission.scores:
        if letter not in letters:
            raise InputError("scores", letter, f"names no answer; there are {', '.join(letters)}", "name one of them")
    said = (submission.preferred, any(submission.scores.values()), submission.corrected, submission.task_category)
    if not any(said):
        raise InputError("scores", {}, "says nothing about the answer", "send scores or a corrected answer, or skip")


def _labels(submission: LabelItem, item: Item, reviewer: str, event_id: str) -> list[Event]:
    """A label about each answer, the first shown first: so a later judgement supersedes all of an earlier one."""
    names, letters = item.names, places(item)
    preferred = None if submission.preferred in (None, TIE) else names[letters[submission.preferred]]
    events: list[Event] = []
    for letter, place in letters.items():
        body = {
            "reviewer": reviewer,
            "item_id": item.item_id,
            "answer": None if "interaction_id" in item.answers[place] else names[place],
            "preferred": preferred,
            "scores": submission.scores.get(letter, {}),  # type: ignore[call-overload]
            **{name: getattr(submission, name) for name in ("corrected", "task_category", "complexity", "notes")},
        }
        about = item.answers[place].get("interaction_id")
        events.append(_event(LABEL, item, event_id if not events else f"{event_id}.{letter}", body, about))
    return events


def _event(kind: str, item: Item, event_id: str, body: dict[str, Any], about: str | None = None) -> Event:
    return Event(
        kind, item.tenant, item.workspace,
        parse_body(kind, {name: value for name, value in body.items() if value is not None}),
        event_id=event_id, user_id=item.user_id, agent=item.agent, interaction_id=about,
    )  # fmt: skip
