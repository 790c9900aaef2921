"""Versions out of the ordinary: what counts as such, and where it shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import Engine as Database

from cluster.database import write
from cluster.settings import load_settings
from cluster.settings.experiments import ExperimentSettings
from cluster.settings.serving import AnomalySettings
from data.events import Event, parse_body
from data.log import EventLog
from serve.anomalies import AnomalyWatch
from serve.arms import Plan
from serve.capture import Record
from serve.experiments.evidence import AnomalyReading
from serve.experiments.projection import Projection
from serve.experiments.readings import read_evidence
from serve.experiments.store import create_experiment
from serve.keys import Key
from serve.rewrite import Answer
from serve.routes import Route, RouteKey
from serve.split import Arm
from tests.serve.conftest import Live, live_router
from tests.serve.rollout_world import fixed_split, interaction

KEY = Key("d", "k", "test", "default", "default", frozenset({"chat"}), None, 0, None, None)
ROUTE = Route("default", "triage", "text", "triage/1", (Arm(0.0, 0.5, "triage/2", "e1"),), experiment_id="e1")
SETTINGS = AnomalySettings(window=20, min_requests=10, latency_min_s=0.1)
FAILED_TOOL = {"role": "tool", "content": '{"error": "no such host"}'}
GOOD_TOOL = {"role": "tool", "content": "ok"}
REFUSAL = {"role": "assistant", "refusal": "I must not help with that."}
REFUSED = Answer(message=REFUSAL, finish_reason="stop")


def record(version: str, **changes: Any) -> Record:
    messages = [{"role": "user", "content": "?"}, *changes.pop("tools", [])]
    plan = Plan("triage", "triage", version, None, "candidate")
    made = Record("i", KEY, plan, {"messages": messages}, "text", None, None, None, served_version=version)
    made.latency_s = 0.1
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def watch(*, stable: dict[str, Any], candidate: dict[str, Any], count: int = 20) -> AnomalyWatch:
    made = AnomalyWatch(SETTINGS)
    for _ in range(count):
        made.observe(record("triage/1", **stable))
        made.observe(record("triage/2", **candidate))
    return made


@pytest.mark.parametrize(
    ("candidate", "signal", "value"),
    [
        ({"latency_s": 0.5}, "latency", 0.5),
        ({"error": "engine_error"}, "errors", 1.0),
        ({"fallback": "engine_timeout", "served_version": "triage/1"}, "errors", 1.0),
        ({"tools": [GOOD_TOOL, FAILED_TOOL]}, "tool_errors", 0.5),
        ({"answer": Answer(finish_reason="content_filter")}, "safety", 1.0),
    ],
)
def test_candidate_that_differs_from_stable_is_told_of_once(
    candidate: dict[str, Any], signal: str, value: float
) -> None:
    seen = watch(stable={"tools": [GOOD_TOOL, GOOD_TOOL]}, candidate=candidate)
    (found,) = seen.check([ROUTE], now=0)
    assert (found.version, found.signal, found.value, found.requests) == ("triage/2", signal, value, 20)
    event = found.event("default", 600)
    assert parse_body(event.kind, dict(event.body))["experiment_id"] == "e1"
    assert seen.check([ROUTE], now=5) == [found]  # until it is in the log
    seen.told([found], now=5)
    assert seen.check([ROUTE], now=10) == []
    assert seen.current == (found,)
    assert seen.check([ROUTE], now=SETTINGS.repeat_s + 5) == [found]


def test_ordinary_versions_too_few_requests_refusals_and_clients_that_left_are_no_anomaly() -> None:
    assert watch(stable={}, candidate={}).check([ROUTE], now=0) == []
    assert watch(stable={}, candidate={"error": "x"}, count=9).check([ROUTE], now=0) == []
    assert watch(stable={}, candidate={"error": "x", "disconnected": True}).check([ROUTE], now=0) == []
    assert watch(stable={"error": "x"}, candidate={"error": "x"}).check([ROUTE], now=0) == []
    assert watch(stable={}, candidate={"answer": REFUSED}).check([ROUTE], now=0) == []
    assert watch(stable={}, candidate={"rejected": "invalid_value", "served_version": None}).check([ROUTE], now=0) == []


def test_stable_is_held_against_its_own_past() -> None:
    seen = watch(stable={}, candidate={})
    for _ in range(20):
        seen.observe(record("triage/1", error="engine_error"))
    (found,) = seen.check([ROUTE], now=0)
    assert (found.version, found.signal, found.baseline) == ("triage/1", "errors", 0.0)


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Live]:
    settings = {"anomaly": {"min_requests": 10, "window": 20, "check_s": 0.01}, "breaker": {"consecutive": 1000}}
    yield from live_router(tmp_path / "home", serve=settings)


def test_anomaly_is_an_event_and_a_line_of_the_status(quick: Live) -> None:
    quick.route(candidate="triage/2", share=0.5)
    quick.engine.behaviours["triage-2-abababababab"].status = 500
    client = quick.client()
    for number in range(60):
        client.chat.completions.create(
            model="triage", messages=[{"role": "user", "content": "?"}], user=f"user-{number}"
        )
    event = quick.events("anomaly.detected", 1)[0].event
    assert (event.agent, event.body["version"], event.body["signal"]) == ("triage", "triage/2", "errors")
    headers = {"authorization": f"Bearer {quick.secret}"}
    status = httpx.get(f"{quick.url}/v1/agents/status", headers=headers).json()
    assert status["data"][0]["anomalies"][0]["version"] == "triage/2"


def test_controller_reads_the_candidates_anomalies_of_its_experiment(database: Database) -> None:
    key = RouteKey("default", "triage")
    shares = {"triage/1": 0.5, "triage/2": 0.5}
    with write(database).begin() as connection:
        experiment = create_experiment(
            connection, key, stable="triage/1", candidate="triage/2", shares=shares, find_version=str, config={}
        )
    body = {
        "version": "triage/2", "signal": "latency", "value": 3.25, "baseline": 0.2, "limit": 1.0, "requests": 50,
        "experiment_id": experiment.experiment_id,
    }  # fmt: skip
    others = [{"version": "triage/1"}, {"experiment_id": "another"}, {"signal": "errors", "version": "triage/9"}]
    for number, changed in enumerate([{}, *others]):
        event = Event("anomaly.detected", "default", "default", body | changed, event_id=f"a{number}", agent="triage")
        EventLog(database).append([event])
    evidence = read_evidence(database, experiment.experiment_id, ExperimentSettings(), period="ramp")
    assert evidence.anomalies == (AnomalyReading("latency", "latency 3.25, above 1", False),)


@pytest.mark.parametrize(
    ("signal", "stable", "candidate", "certain"),
    [
        ("latency", {}, {"latency_s": 2.0}, True),
        ("latency", {}, {}, False),
        ("errors", {}, {"flags": {"error": "engine_error"}}, True),
        ("errors", {"flags": {"error": "x"}}, {"flags": {"error": "x"}}, False),
        ("safety", {}, {"finish_reason": "content_filter", "flags": {"safety": True}}, True),
        ("safety", {}, {"response": REFUSAL}, False),
        ("tool_errors", {"messages": [GOOD_TOOL]}, {"messages": [FAILED_TOOL]}, True),
        ("tool_errors", {"messages": [GOOD_TOOL]}, {"messages": [GOOD_TOOL]}, False),
    ],
)
def test_only_what_the_statistics_bear_out_is_certain(
    sqlite_database: Database, signal: str, stable: dict[str, Any], candidate: dict[str, Any], certain: bool
) -> None:
    """Every latency is far below the objective, so that no guardrail speaks of it."""
    assign = fixed_split(0.5, "salt")
    settings = load_settings(experiment={"tuning_users": 100, "tuning_trials": 100})[0]
    with write(sqlite_database).begin() as connection:
        made = create_experiment(
            connection, RouteKey("acme", "triage"), stable="triage/1", candidate="triage/2",
            shares={"triage/1": 0.5, "triage/2": 0.5}, find_version=str, config={}, at_us=0,
        )  # fmt: skip
    requests = []
    for number in range(400):
        user = f"user-{number}"
        assigned, _ = assign(user)
        told = candidate if assigned.arm == "candidate" else stable
        requests.append(interaction(f"i{number}", assigned, user=user, experiment_id=made.experiment_id, **told))
    body = {
        "version": "triage/2", "signal": signal, "value": 0.5, "baseline": 0.0, "limit": 0.1, "requests": 50,
        "experiment_id": made.experiment_id,
    }  # fmt: skip
    requests.append(Event("anomaly.detected", "acme", "main", body, event_id="a", agent="triage"))
    EventLog(sqlite_database).append(requests)
    Projection(sqlite_database, settings).catch_up()
    evidence = read_evidence(sqlite_database, made.experiment_id, settings.experiment, period="ramp")
    assert [(a.signal, a.is_certain) for a in evidence.anomalies] == [(signal, certain)]
