"""Copies of requests: what they leave behind, and what they must never do."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data.events import parse_body
from serve.shadow import agreement, stubbed_calls
from tests.serve.conftest import Live, live_router
from tests.serve.upstream import Behaviour

SHADOW = "triage-2-abababababab"
MESSAGES = [{"role": "user", "content": "?"}]
CALLS = [{"id": "c1", "type": "function", "function": {"name": "restart", "arguments": '{"host": "db"}'}}]


@pytest.fixture
def shadowed(tmp_path: Path) -> Iterator[Live]:
    settings = {"enabled": True, "max_concurrent": 2, "review_share": 1.0, "timeout_s": 5}
    for live in live_router(tmp_path / "home", shadow=settings, serve={"open_metrics": True}):
        live.route(shadow="triage/2")
        yield live


def ask(live: Live, **extra: Any) -> Any:
    return live.client().chat.completions.create(model="triage", messages=MESSAGES, user="ann", **extra)


def both(live: Live, count: int = 2) -> tuple[list[Any], list[Any]]:
    """Live and shadow interactions."""
    found = [r.event for r in live.events("interaction", count)]
    return [e for e in found if e.body["arm"] != "shadow"], [e for e in found if e.body["arm"] == "shadow"]


def outcomes(live: Live) -> str:
    return httpx.get(f"{live.url}/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_pair_is_recorded_and_the_user_sees_only_the_live_answer(shadowed: Live, stream: bool) -> None:
    shadowed.engine.behaviours[SHADOW].text = "Page the owner now"
    answer = ask(shadowed, stream=stream)
    said = "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
    assert said == "It is a false alarm"
    pair = shadowed.events("shadow.pair", 1)[0].event
    (live,), (shadow,) = both(shadowed)
    assert parse_body("interaction", dict(shadow.body)) and parse_body("shadow.pair", dict(pair.body))
    assert (shadow.body["served_version"], shadow.body["flags"]["shadow"]) == ("triage/2", True)
    assert shadow.body["messages"] == live.body["messages"]
    assert shadow.body["response"]["content"] == "Page the owner now"
    assert shadow.body["metadata"]["shadow_of"] == live.interaction_id
    assert "experiment_id" not in shadow.body and "propensity" not in shadow.body
    assert (pair.interaction_id, pair.user_id) == (live.interaction_id, live.user_id)
    assert pair.body == {
        "shadow_interaction_id": shadow.interaction_id, "live_version": "triage/1", "shadow_version": "triage/2",
        "agreement": 0.0, "for_review": True,
    }  # fmt: skip


def test_text_completions_are_copied_too(shadowed: Live) -> None:
    shadowed.client().completions.create(model="triage", prompt="x")
    assert shadowed.events("shadow.pair", 1)[0].event.body["agreement"] == 1.0
    assert shadowed.engine.paths == ["/v1/completions"] * 2


def test_tool_calls_of_a_copy_are_recorded_as_stubs_and_nobody_gets_them(shadowed: Live) -> None:
    shadowed.engine.behaviours[SHADOW].tool_calls = CALLS
    assert ask(shadowed).choices[0].message.tool_calls is None
    assert shadowed.events("shadow.pair", 1)[0].event.body["agreement"] == 0.0
    _, (shadow,) = both(shadowed)
    assert shadow.body["tool_calls"] == [
        {"name": "restart", "call_id": "c1", "arguments": '{"host": "db"}', "result": {"stubbed": True}}
    ]
    assert len(shadowed.engine.requests) == 2  # nothing was sent on


@pytest.mark.parametrize(
    ("behaviour", "flags"),
    [
        (Behaviour(status=500), {"error": "engine_error"}),
        (Behaviour(status=400), {"rejected": "400"}),
        (Behaviour(break_after=1), {"error": "engine_error"}),
    ],
)
def test_failure_of_a_copy_is_counted_and_is_nobodys_error(
    shadowed: Live, behaviour: Behaviour, flags: dict[str, str]
) -> None:
    shadowed.engine.behaviours[SHADOW] = behaviour
    list(ask(shadowed, stream=True))
    (live,), (shadow,) = both(shadowed)
    assert "error" not in live.body["flags"]
    assert shadow.body["flags"].items() >= flags.items()
    assert shadowed.events("shadow.pair", 0) == []
    assert 'rayloop_shadowed_total{agent="triage",outcome="failed",tenant="default",workspace="default"}' in outcomes(
        shadowed
    )


def test_copies_are_bounded_and_never_hold_up_the_live_answer(shadowed: Live) -> None:
    shadowed.engine.behaviours[SHADOW].delay_s = 2.0
    for _ in range(6):
        assert ask(shadowed)
    assert sum(r["model"] == SHADOW for r in shadowed.engine.requests) <= 2
    assert sum(r["model"] == "base" for r in shadowed.engine.requests) == 6
    live, shadow = both(shadowed, 8)
    assert (len(live), len(shadow)) == (6, 2)
    assert max(e.body["latency_s"] for e in live) < min(e.body["latency_s"] for e in shadow)
    assert 'outcome="dropped",' in outcomes(shadowed)


def test_nothing_is_copied_while_shadows_are_off(live: Live) -> None:
    live.route(shadow="triage/2")
    ask(live)
    live.events("interaction", 1)
    time.sleep(0.2)
    assert [r["model"] for r in live.engine.requests] == ["base"]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a b c", "a b c", 1.0),
        ("A  b", "a b", 1.0),
        ("a b", "a c", 0.5),
        ("a a b", "a b b", 2 / 3),
        ("", "", 1.0),
        ("a", "", 0.0),
        ('{"verdict": "page", "owner": "x"}', '{"owner": "x", "verdict": "ticket"}', 0.5),
        ('{"a": null}', '{"b": 1}', 0.0),
    ],
)
def test_agreement_of_texts_and_objects(one: str, other: str, expected: float) -> None:
    assert agreement({"content": one}, {"content": other}) == pytest.approx(expected)
    assert agreement({"content": other}, {"content": one}) == pytest.approx(expected)


def test_agreement_of_calls_is_by_name_and_arguments() -> None:
    same = [{"id": "c9", "function": {"name": "restart", "arguments": '{ "host":"db"}'}}]
    assert agreement({"tool_calls": CALLS}, {"tool_calls": same}) == 1.0
    assert agreement({"tool_calls": CALLS}, {"content": "x"}) == 0.0


def test_odd_calls_make_no_stub() -> None:
    assert stubbed_calls({"tool_calls": [None, {}, {"function": {"name": ""}}, {"function": {"name": 7}}]}) == []
    assert stubbed_calls({"tool_calls": "x"}) == []
