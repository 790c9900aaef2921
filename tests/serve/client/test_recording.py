"""What an agent does becomes interactions, tool calls and trajectories, and stays what it was."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from serve.client import Client
from tests.serve.client.conftest import ASK, balanced
from tests.serve.conftest import Live


def test_decorated_function_becomes_an_interaction_with_its_user_tools_and_feedback(
    live: Live, rayloop: Client
) -> None:
    @rayloop.tool
    def look_up(host: str) -> dict[str, str]:
        return {"owner": "ops", "mail": "eve@example.com"}

    @rayloop.prediction(agent="triage", metadata={"build": 7})
    def answer(messages: list[dict[str, Any]]) -> str:
        look_up("db-1")
        return "Ask bob@example.com, not eve@example.com."

    with rayloop.speaking(user="ann@example.com", session="s1"):
        assert answer(ASK) == "Ask bob@example.com, not eve@example.com."
        interaction_id = rayloop.last_interaction_id
        assert interaction_id is not None
        assert rayloop.feedback(interaction_id, "thumbs_up")
    assert rayloop.flush(20)
    event = live.events("interaction", 1)[0].event
    assert event.interaction_id == interaction_id
    assert (event.agent, event.session_id, event.body["metadata"]) == ("triage", "s1", {"build": 7})
    call, result = event.body["messages"][1:]
    assert event.body["messages"][0] == ASK[0]
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"host": "db-1"}
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
    assert json.loads(result["content"]) == {"owner": "ops", "mail": "<EMAIL_1>"}
    assert event.body["response"]["content"] == "Ask <EMAIL_2>, not <EMAIL_1>."
    feedback = live.events("feedback", 1)[0].event
    assert (feedback.interaction_id, feedback.user_id) == (interaction_id, event.user_id)
    assert balanced(rayloop)["accepted"] == 2


def test_retried_items_are_duplicates_not_doubles(live: Live, rayloop: Client) -> None:
    for _ in range(2):
        rayloop.feedback("i1", "thumbs_up", event_id="same")
        assert rayloop.flush(20)
    stats = balanced(rayloop)
    assert (stats["accepted"], stats["duplicate"]) == (1, 1)


def test_later_changes_to_the_messages_are_not_recorded(live: Live, rayloop: Client) -> None:
    messages = [dict(ASK[0])]
    with rayloop.predicting("triage", messages=messages) as prediction:
        messages.append({"role": "assistant", "content": "mine"})
        messages[0]["content"] = "changed"
        prediction.answer("ok")
    assert rayloop.flush(20)
    assert live.events("interaction", 1)[0].event.body["messages"] == ASK


def test_exception_passes_unchanged_and_is_noted(live: Live, rayloop: Client) -> None:
    failure = KeyError("nothing")

    @rayloop.prediction(agent="triage")
    def answer(question: str) -> str:
        raise failure

    with pytest.raises(KeyError) as caught:
        answer("Is it?")
    assert caught.value is failure
    assert rayloop.flush(20)
    body = live.events("interaction", 1)[0].event.body
    assert body["messages"] == [{"role": "user", "content": "Is it?"}]
    assert body["flags"]["error"] == "KeyError"
    assert "response" not in body


def test_stop_iteration_of_a_plain_function_passes_unchanged(rayloop: Client) -> None:
    @rayloop.prediction()
    def answer() -> str:
        raise StopIteration("mine")

    with pytest.raises(StopIteration, match="mine"):
        answer()


def test_coroutine_stays_one_and_is_recorded(live: Live, rayloop: Client) -> None:
    @rayloop.tool(name="search")
    async def find(text: str) -> list[str]:
        await asyncio.sleep(0)
        return [text]

    @rayloop.prediction(agent="triage")
    async def answer(messages: list[Any]) -> dict[str, str]:
        await find("x")
        return {"role": "assistant", "content": "yes"}

    assert inspect.iscoroutinefunction(answer)

    async def two() -> list[Any]:
        return await asyncio.gather(answer(ASK), answer(ASK))

    assert asyncio.run(two()) == [{"role": "assistant", "content": "yes"}] * 2
    assert rayloop.flush(20)
    for recorded in live.events("interaction", 2):
        assert [m["role"] for m in recorded.event.body["messages"]] == ["user", "assistant", "tool"]


def test_generator_behaves_as_before_and_is_recorded_whole(live: Live, rayloop: Client) -> None:
    def plain(question: str) -> Iterator[str]:
        sent = yield "It "
        try:
            yield f"{sent} "
        except ValueError as error:
            yield str(error)
        return "end"  # type: ignore[return-value]

    heard = rayloop.prediction(agent="triage")(plain)
    assert inspect.isgeneratorfunction(heard)
    for function in (plain, heard):
        stream: Any = function("?")
        assert (next(stream), stream.send("is"), stream.throw(ValueError("so"))) == ("It ", "is ", "so")
        with pytest.raises(StopIteration) as stop:
            next(stream)
        assert stop.value.value == "end"
    assert rayloop.flush(20)
    body = live.events("interaction", 1)[0].event.body
    assert body["response"]["content"] == "It is so"
    assert 0 <= body["ttft_s"] <= body["latency_s"]


def test_stream_left_half_way_is_marked(live: Live, rayloop: Client) -> None:
    closed = []

    @rayloop.prediction(agent="triage")
    def answer(question: str) -> Iterator[str]:
        try:
            yield "half "
            yield "whole"
        finally:
            closed.append(True)

    stream: Any = answer("?")
    next(stream)
    stream.close()
    assert closed == [True]
    assert rayloop.flush(20)
    body = live.events("interaction", 1)[0].event.body
    assert (body["response"]["content"], body["flags"]["disconnected"]) == ("half ", True)


def test_async_generator_behaves_as_before_and_is_recorded_whole(live: Live, rayloop: Client) -> None:
    async def plain(question: str) -> AsyncIterator[str]:
        sent = yield "a"
        yield f"{sent}"

    heard: Any = rayloop.prediction(agent="triage")(plain)
    assert inspect.isasyncgenfunction(heard)

    async def read(function: Any) -> list[str]:
        stream = function("?")
        pieces = [await stream.asend(None), await stream.asend("b")]
        return pieces + [piece async for piece in stream]

    assert asyncio.run(read(heard)) == asyncio.run(read(plain)) == ["a", "b"]
    assert rayloop.flush(20)
    assert live.events("interaction", 1)[0].event.body["response"]["content"] == "ab"


def test_stream_object_of_a_library_keeps_its_methods(live: Live, rayloop: Client) -> None:
    @rayloop.prediction(agent="triage")
    def answer(messages: list[Any]) -> Any:
        return live.client().chat.completions.create(model="triage", messages=messages, stream=True)

    stream = answer(ASK)
    assert stream.response.status_code == 200
    with stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert rayloop.flush(20)
    bodies = [r.event.body for r in live.events("interaction", 2)]
    assert [body["response"]["content"] for body in bodies] == [text, text]
    assert {"latency_s", "ttft_s"} <= set(bodies[0]) & set(bodies[1])


def test_trajectory_holds_each_step_once(live: Live, rayloop: Client) -> None:
    @rayloop.tool
    def look_up(host: str) -> str:
        return "ops"

    with rayloop.trajectory("triage", metadata={"run": "r1"}) as steps:
        history: list[dict[str, Any]] = list(ASK)
        with rayloop.predicting("triage", messages=history) as first:
            first.answer({"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function"}]})
        assert first.response is not None
        owner = look_up("db-1")
        history += [first.response, {"role": "tool", "tool_call_id": "c1", "content": owner}]
        with rayloop.predicting("triage", messages=history) as second:
            second.answer("It is theirs.")
        look_up("db-2")
        steps.outcome, steps.reward = "solved", 1.0
    assert rayloop.flush(20)
    body = live.events("trajectory", 1)[0].event.body
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "assistant", "tool"]
    assert body["messages"][2]["tool_call_id"] == "c1"
    assert body["messages"][3]["content"] == "It is theirs."
    assert (body["outcome"], body["reward"], body["metadata"]) == ("solved", 1.0, {"run": "r1"})
    assert len(live.events("interaction", 2)) == 2


def test_tool_call_alone_keeps_its_error(live: Live, rayloop: Client) -> None:
    @rayloop.tool
    def look_up(host: str) -> str:
        raise TimeoutError("too slow")

    with pytest.raises(TimeoutError, match="too slow"):
        look_up(host="db-1")
    assert rayloop.flush(20)
    call, result = live.events("trajectory", 1)[0].event.body["messages"]
    assert call["tool_calls"][0]["function"]["name"] == "look_up"
    assert result["error"] == "TimeoutError: too slow"
    assert result["latency_s"] >= 0
