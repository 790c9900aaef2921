"""The tool server over HTTP: schemas, results, refusals, deadlines, writes, records."""

import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from cluster import metrics
from cluster.errors import ConfigError
from serve.keys import create_key
from serve.tools import Caller
from serve.tools.registry import Registry, make_tool, tool
from tests.serve.tools import conftest
from tests.serve.tools.conftest import World


def test_tools_are_listed_with_schemas_from_their_types(world: World) -> None:
    headers = {"authorization": f"Bearer {world.secret}"}
    listed = {t["function"]["name"]: t for t in httpx.get(f"{world.url}/v1/tools", headers=headers).json()["data"]}
    assert {"query_sql", "search_interactions", "get_record", "submit_feedback", "add"} <= set(listed)
    function = listed["add"]["function"]
    assert function["description"] == "The sum of two numbers."
    assert function["parameters"]["required"] == ["a"]
    assert function["parameters"]["properties"]["b"] == {"default": 2, "title": "B", "type": "integer"}
    assert "caller" not in function["parameters"]["properties"]
    assert (listed["add"]["output"], listed["add"]["writes"]) == ({"type": "integer"}, False)
    assert listed["submit_feedback"]["writes"] is True


def test_a_call_gives_the_functions_result(world: World) -> None:
    assert world.call("add", {"a": 1, "b": 4}).json() == {"object": "tool.result", "name": "add", "result": 5}
    assert world.call("add", {"a": 1}).json()["result"] == 3
    assert world.call("add_later", {"a": 1, "b": 4}).json()["result"] == {"sum": 5}


@pytest.mark.parametrize(
    ("name", "arguments", "status", "code", "param"),
    [
        ("none", {}, 404, "tool_not_found", None),
        ("add", {"a": "one"}, 400, "invalid_value", "arguments.a"),
        ("add", {"a": 1, "c": 3}, 400, "invalid_value", "arguments.c"),
        ("add", {}, 400, "invalid_value", "arguments.a"),
        ("add", [1, 2], 400, "invalid_value", "arguments"),
        ("chatter", {"size": 200}, 422, "result_too_large", None),
        ("lie", {}, 500, "tool_failed", None),
        ("write_down", {"text": "x"}, 400, "missing_idempotency_key", "idempotency_key"),
    ],
)
def test_what_cannot_be_answered_says_why(
    world: World, name: str, arguments: Any, status: int, code: str, param: str | None
) -> None:
    answer = world.call(name, arguments)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


def test_a_failing_tool_tells_its_kind_of_error_and_no_more(world: World) -> None:
    answer = world.call("fail")
    assert answer.status_code == 500 and "RuntimeError" in answer.text and "hunter2" not in answer.text


def test_wrong_requests_are_refused(world: World) -> None:
    headers = {"authorization": f"Bearer {world.secret}"}
    url = f"{world.url}/v1/tools/add"
    assert httpx.post(url, content=b"{", headers=headers).status_code == 400
    assert httpx.get(url, headers=headers).status_code == 405
    assert httpx.post(f"{world.url}/v1/other", headers=headers).status_code == 404
    assert (
        httpx.post(url, json={"arguments": {"a": 1}, "extra": 1}, headers=headers).json()["error"]["param"] == "extra"
    )
    assert httpx.post(url, json={"arguments": {"a": 1}, "session": 5}, headers=headers).status_code == 400
    assert httpx.post(url, content=b"x" * 2_000_000, headers=headers).status_code == 413


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"session": "two words"}, "session"),
        ({"call_id": "\0"}, "call_id"),
        ({"idempotency_key": "k" * 200}, "idempotency_key"),
        ({"user": ""}, "user"),
        ({"headers": {"idempotency-key": "a b"}}, "idempotency_key"),
    ],
)
def test_ids_that_the_log_would_refuse_are_refused(world: World, more: dict[str, Any], param: str) -> None:
    error = world.call("add", {"a": 1}, **more).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)


@pytest.mark.parametrize(
    ("document", "param"),
    [
        (json.loads("[" * 200 + "]" * 200), "arguments.document" + ".0" * 99),
        ({"text": "x" * 200_000}, "arguments.document.text"),
    ],
    ids=["nested", "long"],
)
def test_arguments_that_the_log_could_not_keep_are_refused(world: World, document: Any, param: str) -> None:
    sent = json.dumps({"arguments": {"document": document}, "idempotency_key": "odd"}).encode()
    headers = {"authorization": f"Bearer {world.secret}"}
    answer = httpx.post(f"{world.url}/v1/tools/write_document", content=sent, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert world.call("write_document", {"document": {"n": 1}}, idempotency_key="odd").json()["result"] == 1


def test_the_scope_tools_is_asked_for(world: World) -> None:
    chat = create_key(world.database, "chatter", "default", "default", ["chat"])
    assert httpx.post(f"{world.url}/v1/tools/add", json={"arguments": {"a": 1}}).status_code == 401
    assert httpx.get(f"{world.url}/v1/tools").status_code == 401
    assert httpx.get(f"{world.url}/metrics").status_code == 401
    deadline = time.monotonic() + 20
    while (refused := world.call("add", {"a": 1}, secret=chat)).status_code == 401:  # keys are read now and then
        assert time.monotonic() < deadline
    assert refused.json()["error"]["code"] == "insufficient_scope"
    assert httpx.post(f"{world.url}/mcp", json={}).status_code == 401


def test_a_tool_that_hangs_is_given_up_and_then_left_alone(world: World) -> None:
    for _ in range(3):
        answer = world.call("hang")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "tool_timeout")
    alone = world.call("hang")
    assert (alone.status_code, alone.json()["error"]["code"]) == (503, "tool_unavailable")
    assert "retry-after" in alone.headers
    assert world.call("add", {"a": 1}).status_code == 200  # others go on
    assert metrics.REGISTRY.get_sample_value("rayloop_breaker_open", {"version": "tool:hang"}) == 1.0
    text = httpx.get(f"{world.url}/metrics", headers={"authorization": f"Bearer {world.admin}"}).text
    assert 'rayloop_tool_calls_total{outcome="tool_timeout",tool="hang"} 3.0' in text


def test_a_breaker_lets_one_through_after_a_while_and_closes_again(world: World) -> None:
    for _ in range(3):
        assert world.call("write_down", {"text": "x", "fails": True}, call_id="broken").status_code == 500
    assert world.call("write_down", {"text": "x"}, call_id="c0").status_code == 503
    world.runner._breakers["write_down"]._opened_at = time.monotonic() - 61  # half_open_s is over
    assert world.call("write_down", {"text": "x"}, call_id="c0").status_code == 200
    assert not world.runner._breakers["write_down"].is_open


def test_a_wrong_call_does_not_open_the_breaker(world: World) -> None:
    for _ in range(5):
        assert world.call("add", {"a": "x"}).status_code == 400
    assert world.call("add", {"a": 1}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/tools/add", "/mcp"])
def test_more_calls_than_there_are_places_are_refused_at_once(world: World, path: str) -> None:
    host, port = world.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.secret}\r\ncontent-length: 9\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(world.settings.tools.max_ongoing_requests):
            slow = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            slow.sendall(head.encode())
        refused = world.call("add", {"a": 1})
        for _ in range(50):
            if refused.status_code == 429:
                break
            refused = world.call("add", {"a": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"
    time.sleep(0.1)
    assert world.call("add", {"a": 1}).status_code == 200


def test_a_keys_rate_holds_for_tools_too(world: World) -> None:
    answers = [world.call("add", {"a": 1}, secret=world.slow) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


def test_a_write_that_is_sent_again_writes_once(world: World) -> None:
    conftest.WRITTEN.clear()
    first = world.call("write_down", {"text": "once"}, headers={"idempotency-key": "k1"})
    again = world.call("write_down", {"text": "once"}, headers={"idempotency-key": "k1"})
    assert first.json() == again.json() and conftest.WRITTEN == ["once"]
    other = world.call("write_down", {"text": "twice"}, headers={"idempotency-key": "k1"})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert world.call("write_down", {"text": "more"}, idempotency_key="k2").json()["result"] == 2


def test_a_failed_write_may_be_sent_again_under_its_key(world: World) -> None:
    assert world.call("write_down", {"text": "x", "fails": True}, idempotency_key="k3").status_code == 500
    arguments = {"text": "x", "fails": False}
    assert world.call("write_down", arguments, idempotency_key="k3").status_code == 200


@pytest.mark.parametrize(("size", "status", "code"), [(500, 422, "result_too_large"), (0, 500, "tool_failed")])
def test_a_write_whose_result_cannot_be_passed_on_is_made_once(world: World, size: int, status: int, code: str) -> None:
    conftest.WRITTEN.clear()
    for _ in range(2):
        answer = world.call("write_and_chatter", {"text": "once", "size": size}, idempotency_key=f"long-{size}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["x-should-retry"] == "false"
    assert conftest.WRITTEN == ["once"]


def test_a_write_that_gives_nothing_is_made_once(world: World) -> None:
    conftest.WRITTEN.clear()
    for _ in range(2):
        assert world.call("write_and_say_nothing", {"text": "once"}, idempotency_key="nothing").json()["result"] is None
    assert conftest.WRITTEN == ["once"]


def test_a_database_that_is_away_is_told_and_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise sa.exc.OperationalError("insert", {}, Exception("the server is away"))

    def calls(outcome: str) -> float:
        labels = {"tool": "write_down", "outcome": outcome}
        return metrics.REGISTRY.get_sample_value("rayloop_tool_calls_total", labels) or 0.0

    before = calls("ok"), calls("tool_unavailable"), calls("tool_failed")
    monkeypatch.setattr(world.runner.replies, "begin", away)
    answer = world.call("write_down", {"text": "x"}, idempotency_key="k5")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "tool_unavailable")
    assert "retry-after" in answer.headers
    monkeypatch.setattr(world.runner, "_bounded", away)  # a defect of ours
    assert world.call("add", {"a": 1}).json()["error"]["code"] == "tool_failed"
    monkeypatch.undo()
    monkeypatch.setattr(world.runner.replies, "finish", away)
    assert world.call("write_down", {"text": "x"}, idempotency_key="k6").status_code == 200  # it was written
    assert (calls("ok"), calls("tool_unavailable"), calls("tool_failed")) == (before[0] + 1, before[1] + 1, before[2])


def test_a_write_under_way_is_not_made_twice(world: World) -> None:
    owner = ("default", "default", "write_down")
    assert world.runner.replies.begin(owner, "k4", {"text": "x"}) is None
    busy = world.call("write_down", {"text": "x"}, idempotency_key="k4")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "in_progress")
    world.runner.replies._taken_s = -1  # its server died long ago
    assert world.call("write_down", {"text": "x"}, idempotency_key="k4").status_code == 200


def test_calls_are_recorded_in_their_trajectory(world: World) -> None:
    about = {"interaction_id": "i-77", "session": "s-77", "agent": "triage", "call_id": "call-77", "user": "ada"}
    world.call("add", {"a": 40}, **about)
    world.call("fail", {}, **about)
    deadline = time.monotonic() + 20
    while len(found := [r.event for r in world.log.about("default", ["i-77"], kinds=["tool_call"])]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    good, bad = found
    assert (good.body["name"], good.body["arguments"], good.body["result"]) == ("add", {"a": 40}, 42)
    assert (good.session_id, good.agent, good.body["call_id"]) == ("s-77", "triage", "call-77")
    assert good.user_id not in (None, "ada")
    assert good.body["latency_s"] > 0
    assert bad.body["error"].startswith("tool_failed")


def test_a_call_whose_result_the_log_cannot_keep_is_recorded_without_it(world: World) -> None:
    size = world.settings.intake.max_text_chars + 1
    assert len(world.call("say", {"size": size}, interaction_id="i-long").json()["result"]) == size
    deadline = time.monotonic() + 20
    while not (found := [r.event for r in world.log.about("default", ["i-long"], kinds=["tool_call"])]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert found[0].body["arguments"] == {"size": size} and found[0].body.get("result") is None
    assert "characters" in found[0].body["metadata"]["result_left_out"]


def test_tools_without_types_or_names_are_refused() -> None:
    def untyped(caller: Caller, a) -> int:  # type: ignore[no-untyped-def]
        return 1

    def endless(caller: Caller, a: int):  # type: ignore[no-untyped-def]
        return 1

    with pytest.raises(ConfigError, match="has no type"):
        make_tool(untyped, "untyped")
    with pytest.raises(ConfigError, match="has no type"):
        make_tool(endless, "endless")
    with pytest.raises(ConfigError, match="must match"):
        make_tool(lambda caller: 1, "no name")
    registry = Registry()
    tool(registry=registry)(conftest.add)
    with pytest.raises(ConfigError, match=r"tools\.serve='none' is not registered; known are add"):
        registry.only(["none"])
