"""The router over real HTTP, as the official `openai` client sees it."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from data.events import parse_body
from data.feedback import pseudonym, pseudonym_secret
from serve.keys import create_key, list_keys, revoke_key
from tests.serve.conftest import Live, live_router

MESSAGES = [{"role": "user", "content": "Is this an incident?"}]
ANSWER = "It is a false alarm"


def ask(live: Live, **extra: object) -> object:
    return live.client().chat.completions.create(model="triage", messages=MESSAGES, **extra)  # type: ignore[call-overload]


def test_chat_answers_with_who_served_and_strips_what_was_not_asked_for(live: Live) -> None:
    raw = live.client().chat.completions.with_raw_response.create(model="triage", messages=MESSAGES, user="ann")
    completion = raw.parse()
    assert completion.choices[0].message.content == ANSWER
    assert completion.model == raw.headers["x-rayloop-version"] == "triage/1"
    assert completion.id == raw.headers["x-rayloop-interaction"]
    assert raw.headers["x-rayloop-arm"] == "stable"
    assert raw.headers["x-rayloop-digest"] == "ab" * 32
    assert raw.headers["x-request-id"]
    body = json.loads(raw.text)
    assert "prompt_token_ids" not in body
    assert "token_ids" not in body["choices"][0]
    assert body["choices"][0]["logprobs"] is None
    assert live.engine.requests[0]["model"] == "base"


def test_client_gets_token_ids_and_logprobs_it_asked_for(live: Live) -> None:
    completion = live.client().chat.completions.create(
        model="triage",
        messages=MESSAGES,
        logprobs=True,
        extra_body={"return_token_ids": True, "unheard_of": 1},
    )
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].model_extra == {"token_ids": [10, 11, 12, 13, 14]}
    assert live.engine.requests[0]["unheard_of"] == 1


def test_stream_arrives_whole_and_is_captured_whole(live: Live) -> None:
    chunks = list(live.client().chat.completions.create(model="triage", messages=MESSAGES, stream=True, user="ann"))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    assert {c.id for c in chunks} == {chunks[0].id}
    assert {c.model for c in chunks} == {"triage/1"}
    assert all(c.usage is None and c.choices[0].logprobs is None for c in chunks)
    event = live.events("interaction", 1)[0].event
    assert event.interaction_id == chunks[0].id
    assert event.body["response"] == {"role": "assistant", "content": ANSWER}
    assert event.body["completion_token_ids"] == [10, 11, 12, 13, 14]
    assert event.body["prompt_token_ids"] == [1, 2, 3]
    assert event.body["completion_logprobs"] == [-0.5] * 5
    assert event.body["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_text_beside_calls_is_none_whatever_the_engine_says(live: Live, stream: bool) -> None:
    called = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    said = {"role": "assistant", "content": "", "tool_calls": [called]}
    choice = {"index": 0, "delta" if stream else "message": said, "finish_reason": "tool_calls"}
    document = json.dumps({"id": "1", "object": "x", "created": 1, "model": "m", "choices": [choice]}).encode()
    live.engine.behaviours["base"].raw = None if stream else document
    live.engine.behaviours["base"].raw_pieces = [b"data: " + document + b"\n\n"] if stream else None
    answer: Any = live.client().chat.completions.create(model="triage", messages=MESSAGES, stream=stream)
    if stream:
        assert [choice.delta.tool_calls[0].function.name for chunk in answer for choice in chunk.choices] == ["look"]
    else:
        message = answer.choices[0].message
        assert (message.content, message.tool_calls[0].function.name) == (None, "look")
    response = live.events("interaction", 1)[0].event.body["response"]
    assert "content" not in response and response["tool_calls"][0]["id"] == "call-1"


def test_usage_chunk_comes_when_asked_for(live: Live) -> None:
    stream = live.client().chat.completions.create(
        model="triage", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    assert [c.usage.total_tokens for c in stream if c.usage] == [8]


def test_captured_interaction_is_a_valid_body_with_its_assignment(live: Live) -> None:
    live.route(candidate="triage/2", share=0.5, experiment_id="exp-1")
    live.client().chat.completions.create(
        model="triage", messages=MESSAGES, user="ann", temperature=0.5, metadata={"ticket": "T1"},
        extra_headers={"x-rayloop-session": "s1", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
    )  # fmt: skip
    event = live.events("interaction", 1)[0].event
    body = event.body
    assert parse_body("interaction", dict(body)) == body | {"completion_logprobs": body["completion_logprobs"]}
    assert event.user_id == pseudonym(pseudonym_secret(live.settings), "default", "ann")
    assert (event.session_id, event.agent, body["requested"]) == ("s1", "triage", "triage")
    assert body["assignment_unit"] == "user"
    assert (body["arm"] == "candidate") == (body["bucket"] < 0.5)
    assert body["propensity"] == 0.5
    assert (body["experiment_id"], body["route_revision"], body["trace_id"]) == ("exp-1", 2, "a" * 32)
    assert body["parameters"] == {"temperature": 0.5}
    assert body["metadata"] == {"ticket": "T1"}
    assert 0 < body["ttft_s"] <= body["latency_s"]


def test_models_and_status_list_agents_and_their_versions(live: Live) -> None:
    assert [m.id for m in live.client().models.list()] == ["triage", "triage/1", "triage/2"]
    status = httpx.get(f"{live.url}/v1/agents/status", headers={"authorization": f"Bearer {live.secret}"}).json()
    assert (status["data"][0]["agent"], status["data"][0]["stable"]) == ("triage", "triage/1")
    assert status["data"][0]["versions"]["triage/1"]["served"] is True


def test_version_can_be_named_and_counts_for_no_arm(live: Live) -> None:
    raw = live.client().chat.completions.with_raw_response.create(model="triage/2", messages=MESSAGES)
    assert (raw.headers["x-rayloop-version"], raw.headers["x-rayloop-arm"]) == ("triage/2", "none")
    assert live.engine.requests[0]["model"] == "triage-2-abababababab"


def test_wrong_key_scope_and_model_are_refused_in_openai_shape(live: Live) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        live.client("rl-nope").chat.completions.create(model="triage", messages=MESSAGES)
    assert wrong_key.value.code == "invalid_api_key"
    reporter = create_key(live.database, "reporter", "default", "default", ["feedback"])
    live.app.watcher.refresh()
    with pytest.raises(openai.PermissionDeniedError) as wrong_scope:
        live.client(reporter).chat.completions.create(model="triage", messages=MESSAGES)
    assert wrong_scope.value.code == "insufficient_scope"
    with pytest.raises(openai.NotFoundError) as unknown:
        live.client().chat.completions.create(model="billing", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "triage, triage/1, triage/2" in unknown.value.message
    assert unknown.value.response.headers["x-should-retry"] == "false"


def test_other_tenant_sees_neither_route_nor_versions(live: Live) -> None:
    secret = create_key(live.database, "other", "other", "default", ["chat"])
    live.app.watcher.refresh()
    assert [m.id for m in live.client(secret).models.list()] == []
    for model in ("triage", "triage/1"):
        with pytest.raises(openai.NotFoundError):
            live.client(secret).chat.completions.create(model=model, messages=MESSAGES)


def test_revoked_key_stops_with_the_next_reading_which_is_within_two_seconds(live: Live) -> None:
    ask(live)
    revoke_key(live.database, list_keys(live.database)[0].key_id)
    for _ in range(2):  # the first may have begun before
        known = live.app.watcher.current
        while live.app.watcher.current is known:
            time.sleep(0.01)
    with pytest.raises(openai.AuthenticationError):
        ask(live)
    assert live.settings.serve.poll_ms <= 2000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "triage", "messages": [', None),
        (b'{"model": "triage", "messages": "\xff\xfe"}', None),
        (b"[" * 100_000, None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, None),
        (b'{"model": NaN}', None),
        (b"[]", None),
        (b"", None),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "model"),
        (b'{"model": "triage", "messages": "x"}', "messages"),
        (b'{"model": "triage", "messages": []}', "messages"),
        (b'{"model": "triage", "messages": [{}], "stream": "yes"}', "stream"),
        (b'{"model": "triage", "messages": [{}], "user": 7}', "user"),
    ],
)
def test_malformed_body_is_400_with_the_field(live: Live, body: bytes, param: str | None) -> None:
    response = httpx.post(
        f"{live.url}/v1/chat/completions", content=body, headers={"authorization": f"Bearer {live.secret}"}
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) < 500
    assert live.engine.requests == []


def test_wrong_method_and_path(live: Live) -> None:
    wrong = httpx.get(f"{live.url}/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error"]["code"]) == (
        405,
        "POST",
        "method_not_allowed",
    )
    assert httpx.get(f"{live.url}/v2/nothing").json()["error"]["code"] == "unknown_url"


def test_huge_body_is_refused_unread(live: Live) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        live.client().chat.completions.create(model="triage", messages=[{"role": "user", "content": "x" * 3_000_000}])
    assert caught.value.status_code == 413


def test_endless_body_is_refused_when_it_passes_the_limit(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {live.secret}\r\n"
            "transfer-encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        sent = 0
        try:
            while sent < 50_000_000:
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
        except OSError:
            pass
        assert sent < 20_000_000
    assert ask(live)


def test_client_that_leaves_in_mid_stream_stops_the_engine_and_is_recorded(live: Live) -> None:
    live.engine.behaviours["base"].gap_s = 0.3
    with live.client().chat.completions.create(model="triage", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    event = live.events("interaction", 1)[0].event
    assert event.body["flags"]["disconnected"] is True
    assert event.body["response"]["content"].startswith("It")
    deadline = time.monotonic() + 5
    while not live.engine.cut_off and time.monotonic() < deadline:
        time.sleep(0.02)
    assert live.engine.cut_off == 1


def test_engine_that_breaks_in_mid_stream_ends_the_stream_with_an_error(live: Live) -> None:
    live.engine.behaviours["base"].break_after = 2
    live.engine.behaviours["base"].gap_s = 0.05
    with pytest.raises(openai.APIError) as caught:
        list(live.client().chat.completions.create(model="triage", messages=MESSAGES, stream=True))
    assert caught.value.code == "engine_error"
    assert live.events("interaction", 1)[0].event.body["flags"]["error"] == "engine_error"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, "too long"),
        (
            {"error": {"message": "too long", "type": "invalid_request_error", "code": None, "param": None}},
            "too long",
        ),
        ({"detail": "too long"}, "too long"),
        ("too long", "too long"),
    ],
)
def test_engine_refusal_comes_in_openai_shape_whatever_its_own(live: Live, error: object, message: str) -> None:
    live.engine.behaviours["base"].status = 400
    live.engine.behaviours["base"].error = error
    with pytest.raises(openai.BadRequestError) as caught:
        ask(live)
    assert message in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_engine_that_fails_or_is_gone_is_a_5xx_to_be_retried(live: Live) -> None:
    live.engine.behaviours["base"].status = 500
    with pytest.raises(openai.InternalServerError) as caught:
        ask(live)
    assert caught.value.status_code == 502
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["x-should-retry"] == "true"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", serve={"max_ongoing_requests": 1})


def test_overload_is_answered_at_once_with_retry_after(small: Live) -> None:
    small.engine.behaviours["base"].paused = True  # the place is not free before its client leaves
    with small.client().chat.completions.create(model="triage", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            ask(small)
    assert caught.value.response.headers["retry-after"] == "1"


def test_slow_senders_of_feedback_keep_nobody_out_who_chats(small: Live) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    head = f"POST /v1/feedback HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {small.secret}\r\ncontent-length: 9\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(head.encode())
        deadline = time.monotonic() + 10
        while small.app._others.taken == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert ask(small)
        headers = {"authorization": f"Bearer {small.secret}"}
        refused = httpx.post(f"{small.url}/v1/feedback", json={}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", learning={"enabled": False})


def test_with_learning_off_the_router_only_routes(plain: Live) -> None:
    assert ask(plain)
    assert "return_token_ids" not in plain.engine.requests[0]
    feedback = {"interaction_id": "x", "type": "thumbs_up"}
    response = httpx.post(
        f"{plain.url}/v1/feedback", json=feedback, headers={"authorization": f"Bearer {plain.secret}"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (403, "feature_disabled")
    time.sleep(0.2)
    assert plain.events("interaction", 0) == []


def test_health_needs_no_key_and_metrics_need_an_admins(live: Live) -> None:
    ask(live)
    assert httpx.get(f"{live.url}/healthz").json()["status"] == "ok"
    admin = create_key(live.database, "admin", "default", "default", ["admin"])
    live.app.watcher.refresh()
    answers = [
        httpx.get(f"{live.url}/metrics", headers={"authorization": f"Bearer {secret}"})
        for secret in ("rl-wrong", live.secret, admin)
    ]
    assert [answer.status_code for answer in answers] == [401, 403, 200]
    text = answers[-1].text
    assert 'rayloop_requests_total{route="/v1/chat/completions",status="200"}' in text
