"""The agents' client against the real router's intake, the real grader, and services that do not work."""

import asyncio
import inspect
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, InputError
from cluster.settings import Settings
from serve.client import Client, ClientConfig
from serve.graders import GraderApi, KnownKeys
from serve.keys import create_key
from serve.sender import SenderLimits
from tests.serve.conftest import Live
from tests.serve.upstream import Server
from tests.services import Scripted, dripping, hanging, refused, scripted

ASK = [{"role": "user", "content": "Is this an incident?"}]
QUICK = SenderLimits(linger_s=0.0, timeout_s=0.5, retry_s=0.01, exit_s=0.5, half_open_s=30.0)
Make = Callable[..., Client]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Clients that are on, and closed at the end."""
    for name in list(os.environ):
        if name.startswith("RAYLOOP_") and not name.startswith("RAYLOOP_TEST_"):
            monkeypatch.delenv(name)
    made: list[Client] = []

    def client(url: str | None, **changes: Any) -> Client:
        made.append(Client(ClientConfig(enabled=True, url=url, **({"limits": QUICK} | changes))))
        return made[-1]

    yield client
    for one in made:
        one.close()


@pytest.fixture
def rayloop(live: Live, make: Make) -> Client:
    """A client of the real router."""
    return make(live.url, api_key=live.secret)


def balanced(client: Client) -> dict[str, Any]:
    """The numbers, which must add up."""
    stats = client.stats()
    settled = sum(stats[name] for name in ("accepted", "duplicate", "rejected", "dropped", "waiting"))
    assert stats["recorded"] == settled, stats
    return stats


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "serve.client"]


def settle(client: Client, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while not done(stats := balanced(client)):
        assert time.monotonic() < deadline, stats
        threading.Event().wait(0.01)
    return stats


# off


def test_off_returns_the_very_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYLOOP_ENABLED", raising=False)
    client = Client()

    def answer(messages: list[Any]) -> str:
        return "x"

    async def later() -> None: ...

    assert client.prediction(agent="triage")(answer) is answer
    assert client.prediction()(later) is later
    assert client.tool(answer) is answer
    assert client.tool(name="t")(answer) is answer


@pytest.mark.parametrize("value", ["", "false", "0", "no", "TRUEISH"])
def test_anything_but_true_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLOOP_ENABLED", value)
    assert not Client().enabled


def test_off_every_call_is_the_normal_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYLOOP_ENABLED", raising=False)
    client, threads = Client(), threading.active_count()
    with client.trajectory("a") as steps, client.predicting("a", messages=ASK) as prediction:
        prediction.answer("yes")
    with client.using_tool("t", {}) as call:
        call.result = 1
    assert client.call_tool("add", {"a": 1, "b": 2}, local=lambda a, b: a + b) == 3
    assert client.call_tool("add", {}) is None
    assert client.grade({"type": "string_check"}, "x") is None
    assert client.feedback("i", "thumbs_up") is False
    assert (client.flush(), steps.reward, threading.active_count()) == (True, None, threads)


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, serve.client; print(' '.join(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"ray", "torch", "pydantic", "pydantic_settings", "sqlalchemy", "pyarrow", "numpy", "orjson", "aiohttp"}
    assert not heavy & loaded
    assert "data" not in loaded


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClientConfig(enabled=True), "RAYLOOP_URL=None is missing"),
        (ClientConfig(enabled=True, url="ftp://x"), "RAYLOOP_URL='ftp://x' must be an http or https address"),
        (ClientConfig(enabled=True, url="http://x", call_timeout_s=0), "call_timeout_s=0 must be > 0"),
        (ClientConfig(enabled=True, url="http://x", limits=SenderLimits(batch_items=0)), "limits.batch_items=0"),
    ],
)
def test_enabled_without_a_usable_configuration_is_refused_at_once(config: ClientConfig, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + message):
        Client(config)


def test_environment_configures_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"ENABLED": "true", "URL": "https://r", "API_KEY": "rl-1", "DRY_RUN": str(tmp_path / "x.jsonl")}
    for name, value in given.items():
        monkeypatch.setenv(f"RAYLOOP_{name}", value)
    config = ClientConfig.from_environment()
    assert (config.enabled, config.url, config.dry_run) == (True, "https://r", tmp_path / "x.jsonl")
    assert "rl-1" not in repr(config)


# what is recorded


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


def test_rejected_item_is_counted_and_told_of_once(
    live: Live, rayloop: Client, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        rayloop.feedback("i1", "rating", value=9)
    rayloop.feedback("i1", "thumbs_up")
    assert rayloop.flush(20)
    stats = balanced(rayloop)
    assert (stats["rejected"], stats["accepted"]) == (3, 1)
    assert len(warnings(caplog)) == 1
    assert "value=9" in warnings(caplog)[0]


def test_what_cannot_be_recorded_never_reaches_the_agent(rayloop: Client, caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

    @rayloop.prediction(request=lambda x: 1 / 0)  # type: ignore[arg-type,return-value]
    def unreadable_request(x: int) -> int:
        return x

    @rayloop.prediction()
    def unreadable_answer(x: int) -> Any:
        return Odd()

    @rayloop.tool
    def odd(value: float) -> float:
        return value

    assert unreadable_request(3) == 3
    assert isinstance(unreadable_answer(1), Odd)
    assert odd(float("nan")) != odd(float("nan"))
    balanced(rayloop)
    assert rayloop.stats()["unrecorded"] >= 1


# dry run


def test_dry_run_writes_what_would_be_sent_and_sends_nothing(make: Make, tmp_path: Path) -> None:
    service = Scripted((200, b"{}", {}))
    with scripted(service) as url:
        client = make(url, dry_run=tmp_path / "out" / "dry.jsonl")

        @client.prediction(agent="triage")
        def answer(question: str) -> str:
            return "write to eve@example.com"

        answer("?")
        client.feedback("i1", "thumbs_up")
        assert client.call_tool("t", {}, local=lambda: "local") == "local"
        assert client.grade({"type": "string_check"}, "x") is None
        assert client.flush(10)
    lines = [json.loads(line) for line in (tmp_path / "out" / "dry.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["/v1/feedback", "/v1/traces", "/v1/trajectories"]
    shown = next(line["item"] for line in lines if line["path"] == "/v1/traces")
    assert shown["response"]["content"] == "write to <EMAIL_1>"
    assert service.requests == []


# a service that does not work


@pytest.mark.parametrize("kind", ["refused", "hanging", "dripping", "failing", "overloaded", "stranger"])
def test_dead_service_costs_one_warning_and_bounded_memory(
    kind: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The calling thread never touches the network, so what it pays does not depend on the service."""
    answers = {
        "failing": (500, b"", {}),
        "overloaded": (429, b"", {"retry-after": "0.01"}),
        "stranger": (200, b"<html>", {}),
    }
    places = {"refused": lambda: _at(refused()), "hanging": hanging, "dripping": dripping}
    place = places[kind]() if kind in places else scripted(Scripted(answers[kind]))
    limits = SenderLimits(
        linger_s=0, timeout_s=0.2, retry_s=0.01, exit_s=0.3, half_open_s=30, queue_items=50, queue_bytes=50_000
    )
    with place as url:
        client = make(url, limits=limits)

        @client.prediction(agent="triage")
        def answer(question: str) -> str:
            assert threading.current_thread() is threading.main_thread()
            return "yes"

        for _ in range(500):
            assert answer("?") == "yes"
        stats = balanced(client)
        assert stats["waiting"] <= 50
        assert stats["waiting_bytes"] <= 50_000
        assert stats["dropped_by_reason"]["queue_full"] >= 450
        if kind != "dripping":
            settle(client, lambda s: s["breaker_open"])
        client.close()
        stats = balanced(client)
        assert (stats["waiting"], stats["dropped"]) == (0, 500)
    assert len(warnings(caplog)) == 1


def _at(url: str) -> Any:
    from contextlib import nullcontext

    return nullcontext(url)


def test_service_that_returns_gets_what_waited(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    ok = json.dumps({"data": [{"event_id": "x", "status": "accepted"}]}).encode()
    service = Scripted((500, b"", {}), (500, b"", {}), (500, b"", {}), (200, ok, {}))
    limits = SenderLimits(linger_s=0, retry_s=0.01, half_open_s=0.05, batch_items=1)
    with scripted(service) as url:
        client = make(url, limits=limits)
        client.feedback("i1", "thumbs_up")
        assert client.flush(20)
        assert len(service.requests) == 4
        assert len({body for _, body, _ in service.requests}) == 1
    assert balanced(client)["accepted"] == 1
    assert len(warnings(caplog)) == 1


def test_batch_too_long_for_the_service_is_halved(make: Make) -> None:
    ok = json.dumps({"data": [{"event_id": "x", "status": "accepted"}]}).encode()
    service = Scripted((413, b"", {}), (200, ok, {}), (413, b"", {}))
    with scripted(service) as url:
        client = make(url, limits=SenderLimits(linger_s=30))
        client.feedback("i1", "thumbs_up")
        client.feedback("i2", "thumbs_up")
        assert client.flush(20)
    stats = balanced(client)
    assert (stats["accepted"], stats["rejected"]) == (1, 1)


def test_redirect_is_not_followed_with_the_key(make: Make) -> None:
    thief = Scripted((200, b"{}", {}))
    with scripted(thief) as target, scripted(Scripted((302, b"", {"location": target}))) as url:
        client = make(url, api_key="rl-secret")
        client.feedback("i1", "thumbs_up")
        settle(client, lambda s: s["breaker_open"])
    assert thief.requests == []


def test_nothing_unscrubbed_leaves_when_scrubbing_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Scripted((200, b"{}", {}))
    monkeypatch.setitem(sys.modules, "data.scrub", None)
    with scripted(service) as url:
        client = make(url)
        client.feedback("i1", "thumbs_up", text="eve@example.com")
        settle(client, lambda s: s["dropped_by_reason"].get("not_scrubbed") == 1)
    assert service.requests == []


def test_flood_from_many_threads_adds_up(live: Live, make: Make) -> None:
    client = make(live.url, api_key=live.secret, limits=SenderLimits(queue_items=300, linger_s=0.01), scrub=False)

    def flood() -> None:
        for _ in range(200):
            client.feedback("i1", "thumbs_up")

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.flush(30)
    stats = balanced(client)
    assert stats["recorded"] == 1600
    assert stats["accepted"] + stats["dropped"] == 1600
    assert len(live.events("feedback", 1)) == min(stats["accepted"], 1000)


def test_item_too_large_is_dropped_and_counted(make: Make) -> None:
    client = make(refused(), limits=SenderLimits(item_bytes=1000))
    assert client.feedback("i1", "correction", text="x" * 2000) is False
    assert balanced(client)["dropped_by_reason"] == {"too_large": 1}


AGENT = """
import os, sys
from serve.client import Client
rayloop = Client()
rayloop.feedback("parent", "thumbs_up")
if "fork" in sys.argv:
    pid = os.fork()
    if pid == 0:
        rayloop.feedback("child", "thumbs_up")
        rayloop.close()
        os._exit(0)
    os.waitpid(pid, 0)
if "multiprocessing" in sys.argv:
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=rayloop.feedback, args=("child", "thumbs_up"))
    child.start(); child.join()
"""


@pytest.mark.parametrize("way", ["plain", "fork", "multiprocessing"])
def test_end_of_a_process_sends_what_waits(way: str, live: Live) -> None:
    environment = os.environ | {"RAYLOOP_ENABLED": "true", "RAYLOOP_URL": live.url, "RAYLOOP_API_KEY": live.secret}
    run = subprocess.run([sys.executable, "-c", AGENT, way], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    wanted = ["parent"] if way == "plain" else ["child", "parent"]
    found = [r.event.interaction_id for r in live.events("feedback", len(wanted))]
    assert sorted(map(str, found)) == wanted


# tools and grader


def test_grade_comes_from_the_real_grader(live: Live, make: Make, settings: Settings) -> None:
    secret = create_key(live.database, "judge", "default", "default", ["grade"])
    with Server(GraderApi(live.settings.grader, KnownKeys(live.settings, 0.1).find), "on") as url:
        client = make(live.url, api_key=secret, grader_url=url, call_timeout_s=20)
        label = {"type": "dataset_label", "name": "label"}
        grade = client.grade(label, "1", {"reference": "1"})
        assert grade is not None
        assert grade.reward == 1.0
        abstained = asyncio.run(client.grade_async(label, "1"))
        assert abstained is not None
        assert abstained.reward is None
        with pytest.raises(InputError, match=r"call=400|type="):
            client.grade({"type": "unheard of"}, "1")


def test_tool_comes_from_the_server_and_is_noted(make: Make) -> None:
    service = Scripted((200, b'{"result": [1, 2]}', {}))
    with scripted(service) as url:
        client = make(refused(), tools_url=url, api_key="rl-1")
        with client.predicting("a", messages=ASK) as prediction:
            assert client.call_tool("my search", {"q": "x"}, local=lambda q: "local") == [1, 2]
        path, body, headers = service.requests[0]
    sent = json.loads(body)
    assert (path, sent["arguments"]) == ("/v1/tools/my%20search", {"q": "x"})
    assert sent["call_id"].startswith("call_")  # a retry under it writes nothing twice
    assert headers["authorization"] == "Bearer rl-1"
    assert json.loads(prediction._calls[1]["content"]) == [1, 2]


@pytest.mark.parametrize("kind", ["refused", "hanging", "dripping", "failing"])
def test_dead_tools_and_grader_mean_the_normal_flow(kind: str, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    places = {"refused": lambda: _at(refused()), "hanging": hanging, "dripping": dripping}
    with places[kind]() if kind in places else scripted(Scripted((500, b"", {}))) as url:
        client = make(refused(), tools_url=url, grader_url=url, call_timeout_s=0.1, limits=SenderLimits(linger_s=60))
        for _ in range(6):
            assert client.call_tool("add", {"a": 1}, local=lambda a: a + 1) == 2
        assert client.grade({"type": "string_check"}, "x") is None
    assert client.stats()["unanswered_calls"] == 7
    assert len(warnings(caplog)) == 2  # one for each of the two services


def test_open_breaker_asks_nobody(make: Make) -> None:
    service = Scripted((500, b"", {}))
    with scripted(service) as url:
        client = make(refused(), tools_url=url, limits=SenderLimits(consecutive=3, half_open_s=60, linger_s=60))
        for _ in range(10):
            assert client.call_tool("t", {}, local=lambda: 5) == 5
    assert len(service.requests) == 3


def test_refused_arguments_are_the_callers_error(make: Make) -> None:
    refusal = b'{"error": {"message": "q is missing", "param": "q"}}'
    with scripted(Scripted((400, refusal, {}))) as url:
        client = make(refused(), tools_url=url, limits=SenderLimits(linger_s=60))
        with pytest.raises(InputError, match="q=400 q is missing"):
            client.call_tool("t", {}, local=lambda: 5)
