"""What happens to the users of a candidate that fails: stable answers, and the record says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.keys import create_key
from serve.routes import RouteKey, update_route
from tests.serve.conftest import Live, live_router
from tests.serve.upstream import Behaviour

MESSAGES = [{"role": "user", "content": "?"}]
CANDIDATE = "triage-2-abababababab"


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Live]:
    yield from with_candidate(tmp_path, budget_s=30)


@pytest.fixture
def hurried(tmp_path: Path) -> Iterator[Live]:
    yield from with_candidate(tmp_path, budget_s=0.3)


def with_candidate(folder: Path, budget_s: float) -> Iterator[Live]:
    for live in live_router(folder / "home", serve={"fallback": {"budget_s": budget_s, "min_budget_s": budget_s}}):
        live.route(candidate="triage/2", share=1.0, experiment_id="exp-1")
        yield live


def ask(live: Live, **extra: Any) -> Any:
    return live.client().chat.completions.with_raw_response.create(
        model="triage", messages=MESSAGES, user="ann", **extra
    )  # type: ignore[call-overload]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        (Behaviour(status=500), "engine_error"),
        (
            Behaviour(status=404, error={"error": {"message": "no", "code": "model_not_found"}}),
            "model_not_found",
        ),
        (Behaviour(raw=b'data: {"error": {"message": "no", "code": "engine_error"}}\n\n'), "engine_error"),
        (Behaviour(raw=b"data: <html>\n\n"), "engine_error"),
        (Behaviour(raw=b""), "engine_error"),
    ],
)
def test_stable_answers_for_a_candidate_that_fails(
    canary: Live, behaviour: Behaviour, cause: str, stream: bool
) -> None:
    canary.engine.behaviours[CANDIDATE] = behaviour
    assert_stable_stands_in(canary, stream, cause)


@pytest.mark.parametrize("stream", [False, True])
def test_stable_answers_for_a_candidate_that_is_over_its_budget(hurried: Live, stream: bool) -> None:
    hurried.engine.behaviours[CANDIDATE].delay_s = 60
    assert_stable_stands_in(hurried, stream, "engine_timeout")


def assert_stable_stands_in(live: Live, stream: bool, cause: str) -> None:
    raw = ask(live, stream=stream)
    if stream:
        assert {chunk.model for chunk in raw.parse()} == {"triage/1"}
    else:
        assert raw.parse().model == "triage/1"
    assert (raw.headers["x-rayloop-version"], raw.headers["x-rayloop-arm"]) == ("triage/1", "candidate")
    body = live.events("interaction", 1)[0].event.body
    assert (body["arm"], body["assigned_version"], body["served_version"]) == (
        "candidate",
        "triage/2",
        "triage/1",
    )
    assert (body["flags"]["fallback"], body["flags"]["timeout"]) == (True, cause == "engine_timeout")
    assert body["metadata"]["fallback_cause"] == cause


@pytest.mark.parametrize(
    "raw", [b"{}", b"[]", b"<html>", b'{"choices": 7}', b'{"choices": [{"logprobs": {"content": [{}]}}]}']
)
def test_answer_that_is_no_completion_is_a_failure_of_the_candidate(canary: Live, raw: bytes) -> None:
    canary.engine.behaviours[CANDIDATE] = Behaviour(raw=raw)
    assert ask(canary).headers["x-rayloop-version"] == "triage/1"
    body = canary.events("interaction", 1)[0].event.body
    assert body["response"]["content"] == "It is a false alarm"


def test_candidate_that_no_engine_holds_falls_back(canary: Live) -> None:
    canary.route(candidate="triage/9", share=1.0)
    assert ask(canary).headers["x-rayloop-version"] == "triage/1"
    assert canary.events("interaction", 1)[0].event.body["metadata"]["fallback_cause"] == "version_not_ready"


def test_breaker_leaves_a_failing_candidate_alone(canary: Live) -> None:
    canary.engine.behaviours[CANDIDATE].status = 500
    for _ in range(8):
        ask(canary)
    assert sum(request["model"] == CANDIDATE for request in canary.engine.requests) == 5
    causes = [r.event.body["metadata"]["fallback_cause"] for r in canary.events("interaction", 8)]
    assert causes == ["engine_error"] * 5 + ["breaker_open"] * 3


def test_request_that_the_engine_rightly_refuses_is_not_the_candidates_fault(canary: Live) -> None:
    canary.engine.behaviours[CANDIDATE].status = 400
    for _ in range(6):
        with pytest.raises(openai.BadRequestError):
            ask(canary)
    assert {request["model"] for request in canary.engine.requests} == {CANDIDATE}
    body = canary.events("interaction", 6)[0].event.body
    assert body["flags"].get("error") is None
    assert body["flags"]["rejected"] == "400"


def test_candidate_that_breaks_in_mid_stream_is_an_error_of_the_candidate(canary: Live) -> None:
    canary.engine.behaviours[CANDIDATE] = Behaviour(break_after=2, gap_s=0.05)
    with pytest.raises(openai.APIError):
        list(ask(canary, stream=True).parse())
    body = canary.events("interaction", 1)[0].event.body
    assert (body["served_version"], body["flags"]["error"], body["flags"]["fallback"]) == (
        "triage/2",
        "engine_error",
        False,
    )


def test_breaker_opens_on_streams_that_break_off(canary: Live) -> None:
    canary.engine.behaviours[CANDIDATE] = Behaviour(break_after=1, gap_s=0.01)
    for _ in range(5):
        with pytest.raises(openai.APIError):
            list(ask(canary, stream=True).parse())
    assert {chunk.model for chunk in ask(canary, stream=True).parse()} == {"triage/1"}
    assert canary.events("interaction", 6)[-1].event.body["metadata"]["fallback_cause"] == "breaker_open"


def test_both_arms_failing_is_a_5xx_soon(canary: Live) -> None:
    canary.engine.behaviours[CANDIDATE].status = 500
    canary.engine.behaviours["base"].status = 503
    with pytest.raises(openai.InternalServerError) as caught:
        ask(canary)  # the client waits for 20 s, and either arm may take 30
    assert caught.value.status_code == 503
    body = canary.events("interaction", 1)[0].event.body
    assert (body["flags"]["fallback"], body["flags"]["error"]) == (True, "engine_error")
    assert "served_version" not in body


def test_pinned_route_serves_stable_and_counts_for_no_arm(canary: Live) -> None:
    canary.route(pinned=True)
    raw = ask(canary)
    assert (raw.headers["x-rayloop-version"], raw.headers["x-rayloop-arm"]) == ("triage/1", "none")


def test_malformed_chunk_in_mid_stream_is_an_error_of_the_candidate_and_ends_the_stream(canary: Live) -> None:
    pieces = [b'{"choices": [{"delta": {"content": "It"}}]}', b'{"choices": [{"logprobs": {"content": [{}]}}]}']
    canary.engine.behaviours[CANDIDATE] = Behaviour(raw_pieces=[b"data: " + piece + b"\n\n" for piece in pieces])
    for _ in range(5):
        with pytest.raises(openai.APIError):
            list(ask(canary, stream=True).parse())
    assert {chunk.model for chunk in ask(canary, stream=True).parse()} == {"triage/1"}
    bodies = [r.event.body for r in canary.events("interaction", 6)]
    assert [body["flags"].get("error") for body in bodies] == ["engine_error"] * 5 + [None]
    assert bodies[-1]["metadata"]["fallback_cause"] == "breaker_open"


def test_clients_that_leave_in_mid_stream_close_no_breaker_and_open_none(canary: Live) -> None:
    canary.engine.behaviours[CANDIDATE] = Behaviour(paused=True)
    for number in range(6):
        with ask(canary, stream=True).parse() as stream:
            next(iter(stream))
        canary.events("interaction", number + 1)
    breaker = canary.app._completions._breakers["triage/2"]
    assert (breaker.is_open, list(breaker._latest)) == (False, [])


def test_client_that_leaves_before_the_first_byte_is_no_error(canary: Live) -> None:
    canary.engine.behaviours[CANDIDATE].delay_s = 20
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{canary.url}/v1/chat/completions", timeout=httpx.Timeout(20, read=0.05),
            json={"model": "triage", "messages": MESSAGES}, headers={"authorization": f"Bearer {canary.secret}"},
        )  # fmt: skip
    flags = canary.events("interaction", 1)[0].event.body["flags"]
    assert (flags["disconnected"], flags.get("error")) == (True, None)


def test_candidate_without_a_stable_is_asked_as_a_candidate(canary: Live) -> None:
    canary.route(stable="triage/9")
    assert ask(canary).headers["x-rayloop-version"] == "triage/2"
    assert not any(latency._latest for latency in canary.app._completions._stable_latency.values())
    canary.engine.behaviours[CANDIDATE].status = 500
    with pytest.raises(openai.InternalServerError):
        ask(canary)
    flags = canary.events("interaction", 2)[-1].event.body["flags"]
    assert (flags["error"], flags["fallback"]) == ("engine_error", False)


def test_budgets_of_two_tenants_are_apart(canary: Live) -> None:
    canary.route(pinned=False, share=0.0)
    secret = create_key(canary.database, "other", "acme", "default", ["chat"])
    update_route(canary.database, RouteKey("acme", "triage"), {"stable": "triage/1"}, writer="person:x")
    canary.app.watcher.refresh()
    ask(canary)
    canary.client(secret).chat.completions.create(model="triage", messages=MESSAGES)  # type: ignore[call-overload]
    assert {key.tenant for key, _ in canary.app._completions._stable_latency} == {"default", "acme"}
