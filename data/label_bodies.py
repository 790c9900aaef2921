"""The bodies of the events about labelling: what people are asked, what they say, what they leave out."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from data.event_body import Body

Reason = Literal["disagreement", "uncertainty", "spot_check", "evaluation"]
Criterion = Literal["success", "helpfulness", "tone", "safety"]
Complexity = Literal["low", "medium", "high"]
ItemId = Annotated[str, Field(min_length=1, max_length=128)]
Reviewer = Annotated[str, Field(min_length=1, max_length=128)]
Scores = dict[Criterion, Annotated[float, Field(ge=0, le=1)]]


class RequestedAnswer(Body):
    """An answer to be judged: one of the log, or one that is only written here."""

    version: str = Field(min_length=1, max_length=160)
    """Who answered; no reviewer sees it."""
    interaction_id: str | None = Field(None, min_length=1, max_length=128)
    """Where the log has it."""
    message: dict[str, Any] | None = None
    """The assistant's message, where the log does not have it."""

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if (self.interaction_id is None) == (self.message is None):
            raise ValueError("an answer has an interaction_id or a message, and not both")
        return self


class LabelRequested(Body):
    """People are asked to judge one answer, or to compare two to the same prompt without knowing whose they are."""

    reason: Reason
    answers: list[RequestedAnswer] = Field(min_length=1, max_length=2)
    messages: list[dict[str, Any]] = Field([])
    """The prompt; empty where the answers are interactions of the log."""
    reviewers: int = Field(1, ge=1, le=10)
    """How many people are to judge it, each on their own."""

    @model_validator(mode="after")
    def _prompt_is_known(self) -> Self:
        if not self.messages and any(answer.message is not None for answer in self.answers):
            raise ValueError("messages must hold the prompt of an answer that the log does not have")
        return self


class Label(Body):
    """A reviewer's judgement of one answer; a later label by the same reviewer supersedes it.

    The event's interaction is the answer judged. A comparison is one such event for each answer.
    """

    reviewer: str
    scores: Scores = Field({})
    task_category: str | None = Field(None, max_length=64)
    """What kind of task it was, in the reviewer's words; reports on reward models are broken down by it."""
    complexity: Complexity | None = None
    """How hard the task was."""
    corrected: str | None = None
    preferred: str | None = None
    """The preferred answer: its interaction id, or what `answer` names."""
    notes: str | None = None
    item_id: ItemId | None = None
    """The item of the queue (`data.labelling.requests.item_id`) that this answers."""
    answer: ItemId | None = None
    """The answer judged, where it is not an interaction of the log (`data.labelling.requests.answer_name`)."""


class LabelSkipped(Body):
    """A reviewer passed over an item of the queue."""

    reviewer: Reviewer
    item_id: ItemId
    notes: str | None = Field(None, max_length=2_000)
    """Why."""
