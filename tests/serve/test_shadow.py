"""Copies of requests: what they leave behind, and what they must never do."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.database import write
from data.events import Event, parse_body
from data.log import EventLog
from serve.arms import opponent
from serve.experiments.projection import Projection
from serve.experiments.readings import read_all
from serve.experiments.store import create_experiment
from serve.routes import Route
from serve.shadow import agreement, stubbed_calls
from serve.split import Arm
from tests.serve.conftest import KEY, Live, live_router
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


def route(*, shadow: str | None = None, shares: dict[str, float] | None = None) -> Route:
    arms = tuple(Arm(0.3 * n, share, version) for n, (version, share) in enumerate((shares or {}).items()))
    return Route("default", "triage", "text", "v1", arms, shadow=shadow)


@pytest.mark.parametrize(
    ("on", "compares", "expected"),
    [
        (route(shadow="v2"), False, {"v1": "v2", "v2": "v1"}),
        (route(shadow="v2", shares={"v2": 0.3}), False, {"v1": "v2", "v2": "v1"}),
        (route(shadow="v9", shares={"v2": 0.3}), True, {"v1": "v9", "v2": "v9"}),
        (route(shares={"v2": 0.3}), True, {"v1": "v2", "v2": "v1"}),
        (route(shares={"v2": 0.3}), False, {"v1": None, "v2": None}),
        (route(shares={"v2": 0.3, "v3": 0.2}), True, {"v1": None, "v2": None}),
        (route(shadow="v2", shares={"v2": 0.3, "v3": 0.2}), True, {"v1": "v2", "v2": "v1", "v3": "v2"}),
        (replace(route(shares={"v2": 0.3}), pinned=True), True, {"v1": None}),
        (route(shadow="v1"), False, {"v1": None}),
    ],
)
def test_who_answers_over_again(on: Route, compares: bool, expected: dict[str, str | None]) -> None:
    assert {served: opponent(on, served, compares=compares) for served in expected} == expected


def test_wins_of_both_arms_are_told_apart_by_an_experiment_on_them(tmp_path: Path) -> None:
    """The route names no shadow: each arm's requests are answered by the other's version over again."""
    experiment = {"primary": "win_rate", "tuning_users": 40, "breach_min_users_per_arm": 5}
    settings = {"enabled": True, "max_load": 1.0, "max_concurrent": 64}
    for live in live_router(tmp_path / "home", shadow=settings, experiment=experiment):
        with write(live.database).begin() as connection:
            made = create_experiment(
                connection, KEY, stable="triage/1", candidate="triage/2", shares={"triage/1": 0.5, "triage/2": 0.5},
                find_version=str, config={},
            )  # fmt: skip
        live.route(candidate="triage/2", share=0.5, salt=made.salt, experiment_id=made.experiment_id)
        client, count = live.client(), 60
        for number in range(count):
            client.chat.completions.create(model="triage", messages=MESSAGES, user=f"user-{number}")  # type: ignore[arg-type]
        pairs = [recorded.event for recorded in live.events("shadow.pair", count)]
        met = {(pair.body["live_version"], pair.body["shadow_version"]) for pair in pairs}
        assert met == {("triage/1", "triage/2"), ("triage/2", "triage/1")}
        EventLog(live.database).append([verdict(pair, won=pair.body["live_version"] == "triage/2") for pair in pairs])
        Projection(live.database, live.settings).catch_up()
        found = read_all(live.database, made.experiment_id, live.settings.experiment, period="ramp")
        (wins,) = [reading for reading in found if reading.metric == "win_rate"]
        assert (wins.candidate.mean, wins.control.mean, wins.effect) == (1.0, 0.0, 1.0)
        assert wins.candidate.users + wins.control.users == count and wins.harm_high is not None and wins.harm_high < 0


def verdict(pair: Event, *, won: bool) -> Event:
    card = {"grader": "better-pairs", "grader_version": "1", "score_card": {"win": float(won)}}
    return Event("grade", pair.tenant, pair.workspace, parse_body("grade", card), interaction_id=pair.interaction_id)


def test_an_answer_that_stable_gave_in_place_of_the_candidate_is_not_compared(shadowed: Live) -> None:
    shadowed.route(candidate="triage/2", share=1.0)
    shadowed.engine.behaviours[SHADOW].status = 500
    assert ask(shadowed).choices[0].message.content
    shadowed.engine.behaviours[SHADOW].status = 200
    assert ask(shadowed).choices[0].message.content
    (pair,) = [recorded.event for recorded in shadowed.events("shadow.pair", 1)]
    assert (pair.body["live_version"], pair.body["shadow_version"]) == ("triage/2", "triage/1")
    assert [r["model"] for r in shadowed.engine.requests] == [SHADOW, "base", SHADOW, "base"]
