"""The tools that come with the server."""

import hashlib
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, Field

from cluster.clock import to_iso
from cluster.errors import InputError, NotFoundError
from cluster.tables import events
from data.events import RecordedEvent, chosen_reports
from data.intake.items import Id, Identity
from data.log import EventLog
from data.reaction_bodies import FeedbackType
from data.template import content_text
from serve.tools.registry import Caller, tool

SHOWN_CHARS = 400  # of a text in a list of hits; `get_record` shows the whole
MIN_SCORE = 40.0  # of 100, below which a hit shares nothing with the query
ABOUT = ("feedback", "grade", "label", "outcome", "tool_call")

Value = str | int | float | bool | None


class QueryResult(BaseModel):
    """Rows of a query."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool


class Hit(BaseModel):
    """One past interaction."""

    interaction_id: str
    agent: str | None
    occurred_at: str
    question: str
    answer: str
    score: float


class Record(BaseModel):
    """One interaction with what was said about it."""

    interaction_id: str
    agent: str | None
    session: str | None
    occurred_at: str
    messages: list[dict[str, Any]]
    response: dict[str, Any] | None
    version: str | None
    about: list[dict[str, Any]]


class Accepted(BaseModel):
    """What became of a submission."""

    event_id: str
    status: Literal["accepted", "duplicate"]


@tool
def query_sql(
    caller: Caller,
    query: Annotated[str, Field(max_length=10_000, description="One SELECT over the allowed views.")],
    parameters: Annotated[dict[str, Value], Field(description="Values of the :names in the query.")] = {},  # noqa: B006
) -> QueryResult:
    """Read rows with SQL: one SELECT over the allowed views; put values in as :name parameters."""
    found = caller.services.sql.run(query, parameters, caller.tenant, caller.workspace)
    return QueryResult(columns=found.columns, rows=found.rows, truncated=found.truncated)


@tool
def search_interactions(
    caller: Caller,
    query: Annotated[str, Field(min_length=1, max_length=1_000)],
    agent: Id | None = None,
    limit: Annotated[int, Field(ge=1, le=50)] = 10,
) -> list[Hit]:
    """Find past questions and answers by their words, the closest first."""
    from rapidfuzz import fuzz, process, utils

    recent = _recent(caller, agent)
    texts = {place: f"{_question(r)}\n{_answer(r)}" for place, r in enumerate(recent)}
    found = process.extract(
        query,
        texts,
        scorer=fuzz.token_set_ratio,
        processor=utils.default_process,
        limit=limit,
        score_cutoff=MIN_SCORE,
    )
    return [_hit(recent[place], score) for _, score, place in found]


@tool
def get_record(caller: Caller, interaction_id: Id) -> Record:
    """One past interaction by its id, with its feedback, grades and labels."""
    log = EventLog(caller.services.database)
    known = [r for r in log.about(caller.tenant, [interaction_id]) if _is_visible(r, caller)]
    reports = chosen_reports(r for r in known if r.event.kind == "interaction")
    if not reports:
        raise NotFoundError(f"there is no interaction {interaction_id!r} here")
    event, body = reports[0].event, reports[0].event.body
    return Record(
        interaction_id=interaction_id,
        agent=event.agent,
        session=event.session_id,
        occurred_at=to_iso(event.occurred_at_us),
        messages=body["messages"],
        response=body.get("response"),
        version=body.get("served_version"),
        about=[{"kind": r.event.kind, **r.event.body} for r in known if r.event.kind in ABOUT],
    )


@tool(writes=True)
def submit_feedback(
    caller: Caller,
    interaction_id: Id,
    type: FeedbackType,
    value: Annotated[float | None, Field(description="The rating, 1 to 5, where `type` is rating.")] = None,
    text: Annotated[str | None, Field(description="The better answer, where `type` is correction.")] = None,
    user: Annotated[str | None, Field(max_length=256)] = None,
) -> Accepted:
    """Say how good a past answer was: a thumb, a rating, or the answer that would have been right."""
    given = {"interaction_id": interaction_id, "type": type, "value": value, "text": text, "user": user}
    item = {name: v for name, v in given.items() if v is not None} | {"event_id": _event_id(caller)}
    identity = Identity(caller.tenant, caller.workspace, caller.user_tier)
    (result,) = caller.services.intake.take_in_and_wait([item], "feedback", identity)
    if result.error is not None:
        raise result.error
    if result.status == "rejected":
        raise InputError("interaction_id", interaction_id, "was refused", "see the log")
    return Accepted(event_id=result.event_id, status=result.status)


def _event_id(caller: Caller) -> str:
    """The same for the same write; another workspace may use the same idempotency key."""
    write = hashlib.sha256(f"{caller.workspace}\0{caller.idempotency_key}".encode())
    return f"tool:{write.hexdigest()[:32]}"


def _recent(caller: Caller, agent: str | None) -> list[RecordedEvent]:
    """The newest interactions of the caller's workspace, oldest first."""
    log, limit = EventLog(caller.services.database), caller.services.settings.tools.search_interactions
    e = events.c
    mine = (e.kind == "interaction") & (e.tenant == caller.tenant) & (e.workspace == caller.workspace)
    if agent is not None:
        mine &= e.agent == agent
    with caller.services.database.connect() as connection:
        query = sa.select(e.interaction_id).where(mine, e.interaction_id.is_not(None)).order_by(e.seq.desc())
        ids = [row[0] for row in connection.execute(query.limit(limit))]
    found = log.about(caller.tenant, ids, kinds=["interaction"])
    return chosen_reports(r for r in found if _is_visible(r, caller))


def _is_visible(recorded: RecordedEvent, caller: Caller) -> bool:
    event = recorded.event
    shadow = event.body.get("arm") == "shadow"  # nobody was given that answer
    return not recorded.erased and event.workspace == caller.workspace and not shadow


def _question(recorded: RecordedEvent) -> str:
    asked = [m for m in recorded.event.body["messages"] if m.get("role") == "user"]
    return content_text(asked[-1]) if asked else ""


def _answer(recorded: RecordedEvent) -> str:
    response = recorded.event.body.get("response")
    return content_text(response) if response else ""


def _hit(recorded: RecordedEvent, score: float) -> Hit:
    return Hit(
        interaction_id=str(recorded.event.interaction_id),
        agent=recorded.event.agent,
        occurred_at=to_iso(recorded.event.occurred_at_us),
        question=_question(recorded)[:SHOWN_CHARS],
        answer=_answer(recorded)[:SHOWN_CHARS],
        score=round(score / 100, 4),
    )
