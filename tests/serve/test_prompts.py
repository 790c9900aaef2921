"""An agent's policy in the system prompt: what the engine reads, what the record says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.arms import Plan
from serve.prompts import Rendered, with_policy
from tests.serve.conftest import Live, live_router

RENDERED = Rendered("Be brief and kind.", "triage@7", {"offset_empathy": 0.05})
PART = {"type": "text", "text": "Rules."}
QUESTION = {"role": "user", "content": "?"}


class Brief:
    """A policy for one agent; keeps whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str | None]] = []

    def render(self, tenant: str, plan: Plan, user: str | None) -> Rendered | None:
        self.asked.append((tenant, plan.agent, user))
        if user is None:
            raise RuntimeError("scripted")
        return RENDERED if plan.version == "triage/1" else None


@pytest.fixture
def brief() -> Brief:
    return Brief()


@pytest.fixture
def ruled(tmp_path: Path, brief: Brief) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", policy=brief)


def test_policy_is_read_by_the_engine_and_recorded_beside_the_clients_own_messages(ruled: Live, brief: Brief) -> None:
    client = ruled.client()
    client.chat.completions.create(model="triage", messages=[QUESTION], user="ann", metadata={"ticket": "T1"})  # type: ignore[list-item]
    assert ruled.engine.requests[0]["messages"] == [{"role": "system", "content": "Be brief and kind."}, QUESTION]
    event = ruled.events("interaction", 1)[0].event
    assert event.body["messages"] == [QUESTION]
    assert event.body["metadata"] == {"ticket": "T1", "policy_version": "triage@7", "offset_empathy": 0.05}
    assert brief.asked == [("default", "triage", event.user_id)]


def test_agent_without_a_policy_and_plain_text_go_as_they_came(ruled: Live, brief: Brief) -> None:
    ruled.client().chat.completions.create(model="triage/2", messages=[QUESTION], user="bob")  # type: ignore[list-item]
    ruled.client().completions.create(model="triage", prompt="x")
    assert ruled.engine.requests[0]["messages"] == [QUESTION]
    assert ruled.engine.requests[1]["prompt"] == "x"
    assert len(brief.asked) == 1


def test_policy_that_fails_costs_no_answer(ruled: Live) -> None:
    assert ruled.client().chat.completions.create(model="triage", messages=[QUESTION])  # type: ignore[list-item]
    assert ruled.engine.requests[0]["messages"] == [QUESTION]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"role": "system", "content": "Rules."}, {"role": "system", "content": "Rules.\n\nBe brief and kind."}),
        ({"role": "developer", "content": ""}, {"role": "developer", "content": "Be brief and kind."}),
        (
            {"role": "system", "content": [{"type": "text", "text": "Rules."}]},
            {
                "role": "system",
                "content": [{"type": "text", "text": "Rules."}, {"type": "text", "text": RENDERED.text}],
            },
        ),
    ],
)
def test_policy_follows_the_first_system_message(first: dict[str, object], expected: dict[str, object]) -> None:
    before = dict(first)
    assert with_policy([first, QUESTION], RENDERED) == [expected, QUESTION]
    assert first == before
