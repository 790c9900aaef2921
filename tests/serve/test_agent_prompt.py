"""An agent's prompt in front of its requests: what engine and record get, and who may answer behind it."""

import json
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa

from cluster.database import write
from cluster.tables import servables
from data.prompt import AgentPrompt
from data.prompt_versions import parse_prompt, set_prompt
from serve.readiness import NotReadyError, only_ready
from serve.routes import RouteKey, update_route
from tests.serve.conftest import KEY, Live, live_router

QUESTION = {"role": "user", "content": "?"}


def prompted(live: Live, system: str = "Sort alerts.", agent: str = "triage") -> AgentPrompt:
    made = set_prompt(live.database, "default", "default", agent, parse_prompt({"system": system}), writer="person:t")
    live.app.watcher.refresh()
    return made


def test_engine_and_record_get_the_prompt_before_the_clients_own_system_message(live: Live) -> None:
    prompt = prompted(live)
    messages = [{"role": "system", "content": "Be brief."}, QUESTION]
    live.client().chat.completions.create(model="triage", messages=messages)  # type: ignore[arg-type]
    sent = [{"role": "system", "content": "Sort alerts.\n\nBe brief."}, QUESTION]
    assert live.engine.requests[0]["messages"] == sent
    body = live.events("interaction", 1)[0].event.body
    assert (body["messages"], body["prompt_digest"]) == (sent, prompt.digest)


def test_the_prompt_holds_for_a_version_asked_by_name_and_not_for_other_agents(live: Live) -> None:
    prompted(live, agent="other")
    live.client().chat.completions.create(model="triage/2", messages=[QUESTION])  # type: ignore[list-item]
    prompted(live)
    live.client().chat.completions.create(model="triage/2", messages=[QUESTION])  # type: ignore[list-item]
    first, second = (request["messages"] for request in live.engine.requests)
    assert first == [QUESTION]
    assert second == [{"role": "system", "content": "Sort alerts."}, QUESTION]
    bodies = [recorded.event.body for recorded in live.events("interaction", 2)]
    assert ["prompt_digest" in body for body in bodies] == [False, True]


def test_a_changed_prompt_is_in_the_next_request(live: Live) -> None:
    prompted(live)
    prompted(live, "Sort alerts well.")
    live.client().chat.completions.create(model="triage", messages=[QUESTION])  # type: ignore[list-item]
    assert live.engine.requests[0]["messages"][0]["content"] == "Sort alerts well."


def test_plain_text_has_no_place_for_a_prompt_and_is_refused(live: Live) -> None:
    prompted(live)
    with pytest.raises(openai.BadRequestError, match="answers chats only"):
        live.client().completions.create(model="triage", prompt="x")
    assert live.engine.requests == []


def test_a_shadow_reads_the_same_prompt(tmp_path: Path) -> None:
    for live in live_router(tmp_path / "home", shadow={"enabled": True}):
        prompt = prompted(live)
        live.route(shadow="triage/2")
        live.client().chat.completions.create(model="triage", messages=[QUESTION])  # type: ignore[list-item]
        bodies = [recorded.event.body for recorded in live.events("interaction", 2)]
        assert {body["arm"] for body in bodies} >= {"shadow"}
        assert {body["prompt_digest"] for body in bodies} == {prompt.digest}
        assert len({json.dumps(body["messages"]) for body in bodies}) == 1


def trained_behind(live: Live, version: str, digest: str | None) -> None:
    with write(live.database).begin() as connection:
        mine = servables.c.version == version
        connection.execute(sa.update(servables).where(mine).values(prompt_digest=digest))


def test_a_version_trained_behind_another_prompt_may_not_begin_to_answer(live: Live) -> None:
    prompt = prompted(live)
    check = only_ready(live.database, {}, live_after_s=10)
    change = {"candidate": "triage/2", "share": 0.5}
    with pytest.raises(NotReadyError, match=f"trained with no prompt, the agent has the prompt {prompt.digest[:12]}"):
        update_route(live.database, KEY, change, writer="person:test", check=check)
    trained_behind(live, "triage/2", "0" * 64)
    with pytest.raises(NotReadyError, match="trained with the prompt 000000000000, the agent has the prompt"):
        update_route(live.database, KEY, change, writer="person:test", check=check)
    trained_behind(live, "triage/2", prompt.digest)
    assert update_route(live.database, KEY, change, writer="person:test", check=check).share == 0.5


def test_a_base_model_as_it_comes_may_answer_behind_any_prompt(live: Live) -> None:
    prompted(live)
    trained_behind(live, "triage/2", None)
    check = only_ready(live.database, {}, live_after_s=10)
    change = {"candidate": "triage/2", "share": 0.5}
    assert update_route(live.database, KEY, change, writer="person:test", check=check).share == 0.5


def test_versions_that_answer_already_go_on_when_the_prompt_changes(live: Live) -> None:
    prompted(live)
    check = only_ready(live.database, {}, live_after_s=10)
    update_route(live.database, RouteKey("default", "triage"), {"pinned": True}, writer="person:test", check=check)
    live.client().chat.completions.create(model="triage", messages=[QUESTION])  # type: ignore[list-item]
    assert len(live.engine.requests) == 1
