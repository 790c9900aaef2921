"""A captured interaction as graders take it, and a verdict on it as an event."""

from typing import Any

from data.events import Event
from data.grading.types import Grader, GradeResult

REASON_CHARS = 2_000
ID_CHARS = 128


def has_answer(event: Event) -> bool:
    """Whether an interaction has an answer in words."""
    answer = event.body.get("response")
    return isinstance(answer, dict) and isinstance(answer.get("content"), str)


def item_of(event: Event) -> dict[str, Any]:
    """What graders see as `item`."""
    return {"messages": event.body["messages"], "tools": event.body.get("tools"), "agent": event.agent}


def sample_of(event: Event) -> dict[str, Any]:
    """What graders see as `sample`."""
    answer = event.body["response"]
    return {"output_text": answer.get("content") or "", "output_tools": answer.get("tool_calls") or []}


def grade_event(event: Event, grader: Grader, result: GradeResult) -> Event:
    """The grade of an interaction as an event."""
    reward = {} if result.reward is None else {"reward": result.reward}
    version = result.grader_version or grader.version
    verdict = {"score_card": result.score_card, "reason": result.reason, "judged": event.event_id}
    return verdict_event(event, grader.name, version, verdict | reward)


def verdict_event(event: Event, name: str, version: str, verdict: dict[str, Any]) -> Event:
    """What is said about the interaction that `event` is about, once under a version."""
    body = {"grader": name, "grader_version": version} | verdict
    return Event(
        "grade", event.tenant, event.workspace, body | {"reason": body["reason"][:REASON_CHARS]},
        event_id=f"grade:{version}:{event.event_id}"[:ID_CHARS],
        user_id=event.user_id, session_id=event.session_id, agent=event.agent, interaction_id=event.interaction_id,
    )  # fmt: skip
