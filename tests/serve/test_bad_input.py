"""Bodies and clients that are wrong on purpose: each is refused with a reason, and nobody else notices."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serve.exchange import understood
from serve.openai import ApiError, ClientGoneError, read_body, sending_within
from serve.proxy import UpstreamError
from serve.rewrite import Rewriter, Wanted
from serve.routes import read_route
from tests.serve.conftest import KEY, Live, live_router

MESSAGES = [{"role": "user", "content": "?"}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "model", "messages", "prompt", "stream", "user", "n", "tools", "metadata", "stream_options", "documents",
    "logprobs", "return_token_ids", "temperature", "response_format",
)  # fmt: skip


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", serve={"body_timeout_s": 0.3})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from live_router(tmp_path_factory.mktemp("bad") / "home")


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_body_that_does_not_come_is_408_and_others_are_served_meanwhile(impatient: Live) -> None:
    slow = [connect(impatient) for _ in range(30)]
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {impatient.secret}\r\n"
    for number, connection in enumerate(slow):
        if number % 2:
            connection.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        else:
            connection.sendall(head.encode())  # not even a whole head
    assert impatient.client().chat.completions.create(model="triage", messages=MESSAGES)  # type: ignore[arg-type]
    for connection in slow[1::2]:
        answer = connection.recv(65536)
        while b'"code"' not in answer:
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"body_timeout"' in answer
    for connection in slow:
        connection.close()


def test_body_of_which_not_even_the_beginning_comes_is_408() -> None:
    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(ApiError, match="did not arrive"):
        asyncio.run(read_body({"headers": []}, never, 1000, 0.01))


def test_send_to_a_client_that_does_not_read_ends() -> None:
    async def blocked(_: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(ClientGoneError):
        asyncio.run(sending_within(blocked, 0.01)({"type": "http.response.start"}))


def test_client_that_stops_reading_a_stream_is_let_go_and_its_place_is_free(tmp_path: Path) -> None:
    piece = b'data: {"choices": [{"delta": {"content": "' + b"x" * 400_000 + b'"}}]}\n\n'
    for live in live_router(tmp_path / "home", serve={"write_timeout_s": 0.3, "max_ongoing_requests": 1}):
        live.engine.behaviours["base"].raw_pieces = [piece] * 40
        body = json.dumps({"model": "triage", "messages": MESSAGES, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {live.secret}\r\n"
        with connect(live) as connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            event = live.events("interaction", 1)[0].event
            assert event.body["flags"]["disconnected"] is True
            assert "error" not in event.body["flags"]
            live.engine.behaviours["base"].raw_pieces = None
            assert live.client().chat.completions.create(model="triage", messages=MESSAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "head",
    [
        "GET /healthz HTTP/1.1\r\nhost: x\r\n" + "".join(f"x-{n}: y\r\n" for n in range(20_000)) + "\r\n",
        "GET /healthz HTTP/1.1\r\nx: " + "y" * 2_000_000 + "\r\n\r\n",
        "GET /" + "a" * 2_000_000 + " HTTP/1.1\r\n\r\n",
        "NONSENSE\r\n\r\n",
        "GET /healthz HTTP/9.9\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        "\0\xff" * 1000,
    ],
    ids=["many headers", "long header", "long path", "no request", "version", "length", "chunk", "bytes"],
)
def test_bytes_that_are_no_request_hurt_nobody(shared: Live, head: str) -> None:
    live = shared
    with connect(live) as connection:
        sender = threading.Thread(target=_send, args=(connection, head.encode("latin-1")))
        sender.start()
        assert live.client().models.list()
        connection.shutdown(socket.SHUT_WR) if not sender.is_alive() else None
    sender.join()
    assert live.client().models.list()


@pytest.mark.parametrize(
    ("encoding", "body", "status", "code"),
    [
        ("gzip", gzip.compress(b'{"model": "triage", "messages": [{"role": "user", "content": "?"}]}'), 200, None),
        ("gzip", b"{}", 400, "invalid_gzip"),
        ("gzip", gzip.compress(b" " * 20_000_000), 413, "body_too_large"),
        ("br", b"{}", 415, "unsupported_encoding"),
    ],
)
def test_bodies_may_be_gzipped_and_nothing_else(
    shared: Live, encoding: str, body: bytes, status: int, code: str | None
) -> None:
    headers = {"authorization": f"Bearer {shared.secret}", "content-encoding": encoding}
    answer = httpx.post(f"{shared.url}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert (answer.status_code, answer.json().get("error", {}).get("code")) == (status, code)


def test_a_websocket_is_refused(shared: Live) -> None:
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    upgrade += f"sec-websocket-key: {'A' * 22}==\r\n"
    with connect(shared) as connection:
        connection.sendall(f"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{upgrade}\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({}, "messages.0.role"),
        ({"role": 5}, "messages.0.role"),
        ({"role": "user", "content": {"a": 1}}, "messages.0.content"),
        ({"role": "user", "content": ["a"]}, "messages.0.content"),
        ({"role": "assistant", "tool_calls": 5}, "messages.0.tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": 5}]}, "messages.0.tool_calls"),
    ],
)
def test_messages_that_readers_of_the_log_could_not_take_are_refused(
    live: Live, message: dict[str, Any], param: str
) -> None:
    headers = {"authorization": f"Bearer {live.secret}"}
    sent = {"model": "triage", "messages": [message]}
    chat = httpx.post(f"{live.url}/v1/chat/completions", json=sent, headers=headers)
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, param)
    trace = {"kind": "interaction", "interaction_id": "i-1", "messages": [message]}
    told = httpx.post(f"{live.url}/v1/traces", json=trace, headers=headers)
    assert (told.status_code, told.json()["error"]["param"]) == (400, param)
    assert live.events("interaction", 0) == []


def test_log_probabilities_that_are_no_flag_are_the_engines_to_refuse(live: Live) -> None:
    headers = {"authorization": f"Bearer {live.secret}"}
    for sent, passed in ((5, 5), (True, True), (None, True), (False, True)):
        body = {"model": "triage", "messages": MESSAGES, "logprobs": sent}
        httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=headers)
        assert live.engine.requests[-1]["logprobs"] == passed


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)


def test_no_document_makes_the_router_fail(shared: Live) -> None:
    """Whatever JSON comes, the answer is one of OpenAI's shape and never a 5xx."""
    live = shared
    headers = {"authorization": f"Bearer {live.secret}"}
    base: dict[str, Any] = {"model": "triage", "messages": MESSAGES, "prompt": "x"}
    with httpx.Client(headers=headers, timeout=30) as client:

        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(["chat/completions", "completions"]), st.dictionaries(st.sampled_from(FIELDS), JSON))
        def hold(path: str, changed: dict[str, Any]) -> None:
            response = client.post(f"{live.url}/v1/{path}", content=json.dumps(base | changed).encode())
            assert response.status_code < 500, (changed, response.text)
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        hold()


def rewriter(max_event_bytes: int = 100_000) -> Rewriter:
    return Rewriter("id", "triage/1", Wanted(False, False, False), max_event_bytes)


CHUNK: dict[str, Any] = {
    "id": "engine-1",
    "choices": [
        {
            "index": 0,
            "delta": {
                "role": "assistant",
                "content": "It",
                "tool_calls": [{"index": 0, "id": "call-1", "function": {"name": "look", "arguments": "{}"}}],
            },
            "message": {"role": "assistant", "content": "It"},
            "finish_reason": "stop",
            "token_ids": [10, 11],
            "logprobs": {"content": [{"token": "It", "logprob": -0.5}], "token_logprobs": [-0.5]},
        }
    ],
    "prompt_token_ids": [1, 2],
    "usage": {"prompt_tokens": 3, "completion_tokens": 5},
}


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a document."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(document[key], (*at, key))


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


@settings(max_examples=150, deadline=None, database=None)
@given(st.sampled_from(list(places(CHUNK))), JSON)
@example(("choices", 0, "logprobs", "content"), [{}])
@example(("choices", 0, "delta", "tool_calls", 0, "function"), "x")
@example(("choices", 0, "token_ids"), "ab")
def test_answer_with_a_part_of_the_wrong_kind_is_recorded_right_or_the_engines_failure(
    place: tuple[Any, ...], value: Any
) -> None:
    """After pieces that were good, as in the middle of a stream."""
    good, wrong = (json.dumps(document).encode() for document in (CHUNK, changed(CHUNK, place, value)))
    for rewrite in (streamed, whole):
        made = rewriter()
        with contextlib.suppress(UpstreamError):
            rewrite(made, good, wrong)
        answer = made.answer
        assert all(type(number) is int for number in (*answer.token_ids, *answer.prompt_token_ids))
        assert all(isinstance(number, int | float) for number in answer.logprobs)
        assert isinstance(answer.finish_reason, str | None)


def streamed(made: Rewriter, good: bytes, wrong: bytes) -> None:
    for piece in (good, wrong, good):
        understood(made.feed, b"data: " + piece + b"\n\n")
    understood(made.end)


def whole(made: Rewriter, _: bytes, wrong: bytes) -> None:
    understood(made.whole, wrong)


def test_event_without_end_is_given_up() -> None:
    made = rewriter(max_event_bytes=2_000)
    for _ in range(2):
        assert understood(made.feed, b"data: " + b"x" * 990) == b""
    with pytest.raises(UpstreamError, match="not a completion"):
        understood(made.feed, b"x" * 100)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(JSON, max_size=5), st.integers(1, 40))
def test_no_answer_of_an_engine_makes_the_rewriter_fail(documents: list[Any], cut: int) -> None:
    """A stream of any JSON, cut anywhere; a whole answer of any JSON."""
    for document in documents:
        with contextlib.suppress(UpstreamError):
            understood(rewriter().whole, json.dumps(document).encode())
    made = rewriter()
    stream = b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents)
    with contextlib.suppress(UpstreamError):
        for start in range(0, len(stream), cut):
            understood(made.feed, stream[start : start + cut])
        assert understood(made.end).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"routes": [{"agent": "triage", "share": 1.5}]}, "share=1.5"),
        ({"routes": [{"agent": "triage", "candidate": "triage/99", "share": 0.5}]}, "triage/99"),
        ({"routes": [{"agent": "triage", "shadow": "triage/98"}]}, "routes.triage.shadow='triage/98'"),
        ({"routes": [{"agent": "triage", "candidate": "nonsense"}]}, "candidate='nonsense'"),
        ({"engines": {"x": {"base_url": "http://10.0.0.1"}}}, "engines.x.base_url"),
        ({"routes": [{"agent": "new"}]}, "must name a version"),
    ],
)
def test_bad_config_is_refused_with_its_reason_and_nothing_moves(
    live: Live, config: dict[str, Any], reason: str
) -> None:
    live.route(candidate="triage/2", share=0.25)
    before = read_route(live.database, KEY)
    live.app.reconfigure(config)
    live.app.watcher.refresh()
    assert reason in str(live.app.watcher.rejection)
    assert read_route(live.database, KEY) == before
    assert reason in live.events("config.rejected", 1)[0].event.body["reason"]
    live.app.reconfigure({"routes": [{"agent": "triage", "candidate": "triage/2", "share": 0.5}]})
    live.app.watcher.refresh()
    assert live.app.watcher.rejection is None
    assert read_route(live.database, KEY).share == 0.5
