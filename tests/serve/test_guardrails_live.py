"""A planted regression of each guardrail under live traffic: two routers over HTTP, an engine, a controller.

Users ask both routers and react; the candidate is bad in one way a case. It must be rolled back for that very
reason, and every replica must send everybody to stable, while a stream of the candidate that is open ends in peace,
and while one of the routers is draining. How soon, `tests/bench/breach.py` measures.
"""

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine as Database

from cluster.database import connect
from cluster.settings import Settings, load_settings
from cluster.tables import events
from data.events import Event, parse_body
from data.log import EventLog
from data.outlets.notices import notice
from serve.assignment import assign_request
from serve.keys import create_key
from serve.replicas import is_served
from serve.rollout.commands import start
from serve.rollout.controller import Controller
from serve.rollout.live import HttpRouters
from serve.rollout.replay import verify_decisions
from serve.rollout.steps import Steps
from serve.rollout.store import Rollout, get_rollout
from serve.router import RouterApp
from serve.routes import Route, RouteKey, read_route, update_route
from tests.serve.conftest import LEARNING, serve_version
from tests.serve.rollout_world import FakeRegistry, FakeServables
from tests.serve.upstream import Behaviour, Engine, Server

USERS = 80
BATCHES = 30
SLOW_S, SLO_S = 3.5, 3.0
"""How long a slow candidate takes, and what is too long."""


@dataclass(frozen=True)
class Case:
    """One way to be bad."""

    metric: str
    behaviour: dict[str, Any] = field(default_factory=dict)
    """Of the candidate's model in the engine."""
    says: Callable[[bool], list[tuple[str, dict[str, Any]]]] = lambda bad: []
    """Reactions to one answer: kind and body of each event; `bad` for the candidate's."""
    stream: bool = False
    tools: bool = False
    code: str = "guardrail"
    rollout: dict[str, Any] = field(default_factory=dict)


def thumb(bad: bool) -> list[tuple[str, dict[str, Any]]]:
    kind, reward = ("thumbs_down", -1.0) if bad else ("thumbs_up", 1.0)
    return [("feedback", {"type": kind, "reward": reward})]


def grade(**good_and_bad: tuple[float, float]) -> Callable[[bool], list[tuple[str, dict[str, Any]]]]:
    def said(bad: bool) -> list[tuple[str, dict[str, Any]]]:
        card = {name: values[bad] for name, values in good_and_bad.items()}
        reward = {"reward": card.pop("reward")} if "reward" in card else {}
        return [("grade", {"grader": "rubric", "grader_version": "1", "score_card": card} | reward)]

    return said


MANY_ERRORS = {"first_requests_max_errors": 100_000}
CASES = [
    Case("error_rate", {"status": 500}, rollout=MANY_ERRORS),
    Case("error_rate", {"status": 500}, code="first_requests"),
    Case("latency_over_slo", {"delay_s": SLOW_S}),
    Case("ttft_over_slo", {"delay_s": SLOW_S}, stream=True),
    Case("refusal_rate", {"finish_reason": "content_filter"}),
    Case("safety_incident_rate", {"finish_reason": "content_filter"}),
    Case("tool_error_rate", tools=True),
    Case("satisfaction", says=thumb),
    Case("thumbs_up_rate", says=thumb),
    Case("rating", says=lambda bad: [("feedback", {"type": "rating", "reward": 0.0, "value": 1 if bad else 5})]),
    Case("feedback_response_rate", says=lambda bad: [] if bad else thumb(False)),
    Case("grader_score", says=grade(reward=(0.9, 0.2))),
    Case("hallucination_rate", says=grade(ungrounded=(0.1, 0.9))),
    Case("win_rate", says=grade(win=(0.8, 0.1))),
    Case("outcome:resolved", says=lambda bad: [("outcome", {"name": "resolved", "value": 0.0 if bad else 1.0})]),
]


class Untried(HttpRouters):
    """Every replica read back, and no candidate tried: the planted faults would fail."""

    def smoke(self, route: Route, version: str) -> str | None:
        return None


@dataclass
class Site:
    """Two routers before one engine, and one database."""

    settings: Settings
    database: Database
    engine: Engine
    urls: list[str]
    secret: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    def begin(self, case: Case) -> "Trial":
        """A route of its own with a candidate at one half."""
        agent = f"agent{next(self.numbers)}"
        for number, model in ((1, f"{agent}-good"), (2, f"{agent}-bad")):
            serve_version(self.database, f"{agent}/{number}", model)
        key = RouteKey("default", agent)
        update_route(self.database, key, {"stable": f"{agent}/1"}, writer="person:test")
        settings = load_settings(
            home=self.settings.home,
            automation={"auto_rollout": True},
            shadow={"enabled": True},
            experiment={
                "primary": "win_rate" if case.metric != "win_rate" else "grader_score", "guardrails": [case.metric],
                "guardrails_when_present": [], "tuning_users": USERS, "tuning_trials": 2 * USERS, "alpha": 0.1,
                "breach_min_users_per_arm": 15, "latency_slo_s": SLO_S, "ttft_slo_s": SLO_S,
            },
            rollout={
                "stages": [0.5, 1.0], "checks": ["significant_improvement", "final_validation"], "tick_s": 0.1,
                "confirm_timeout_s": 30,
            } | case.rollout,
        )[0]  # fmt: skip
        registry = FakeRegistry({f"{agent}/1": "passed", f"{agent}/2": "passed"})
        routers = Untried(self.database, self.urls[0], settings, lambda route: self.secret)
        steps = Steps(self.database, registry, FakeServables(), routers)
        self.engine.behaviours[f"{agent}-bad"] = Behaviour(**case.behaviour)
        trial = Trial(self, case, key, steps, registry, Controller(steps, settings), f"{agent}/2")
        trial.rollout = start(steps, settings, key, f"{agent}/2", actor="person:ann")
        while trial.now.state != "running":
            trial.controller.tick()
        return trial


@dataclass
class Trial:
    """One rollout of a bad candidate."""

    site: Site
    case: Case
    key: RouteKey
    steps: Steps
    registry: FakeRegistry
    controller: Controller
    candidate: str
    asked: int = 0

    def __post_init__(self) -> None:
        self.rollout: Rollout

    @property
    def now(self) -> Rollout:
        return get_rollout(self.site.database, self.rollout.rollout_id)

    def run(self) -> None:
        """Traffic and ticks until the decision is applied and shown."""
        for _ in range(BATCHES):
            asyncio.run(self.batch())
            self.controller.tick()
            while self.now.state == "rolling_back":
                self.controller.tick()
            if self.now.state == "rolled_back":
                self.controller.close()
                return
        pytest.fail(f"not rolled back: {self.now.reason}")

    async def batch(self) -> None:
        """Every user asks once, by turns at both routers, and reacts; returns when all of it is in the log."""
        limits = asyncio.Semaphore(40)

        async def one(client: httpx.AsyncClient, number: int) -> None:
            async with limits:
                await self._turn(client, self.site.urls[number % len(self.site.urls)], f"user-{number}")

        headers = self.site.headers
        async with httpx.AsyncClient(headers=headers, timeout=60) as client, asyncio.TaskGroup() as turns:
            for number in range(USERS):
                turns.create_task(one(client, number))
        self.asked += USERS
        while self._captured() < self.asked:
            await asyncio.sleep(0.01)

    async def _turn(self, client: httpx.AsyncClient, url: str, user: str) -> None:
        body: dict[str, Any] = {"model": self.key.agent, "messages": [{"role": "user", "content": "?"}], "user": user}
        body["stream"] = self.case.stream
        if self.case.tools:
            result = {"error": "gone"} if self.is_candidate(user) else {"rows": 3}
            body["messages"] = [*body["messages"], {"role": "tool", "tool_call_id": "t", "content": json.dumps(result)}]
        response = await client.post(f"{url}/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        bad = response.headers["x-rayloop-arm"] == "candidate"
        said = [
            Event(kind, "default", "default", parse_body(kind, about), interaction_id=interaction)
            for interaction in [response.headers["x-rayloop-interaction"]]
            for kind, about in self.case.says(bad)
        ]
        await asyncio.to_thread(EventLog(self.site.database).append, said)

    def is_candidate(self, user: str) -> bool:
        """Whether the route assigns this user to the candidate, by the router's own pseudonym."""
        from data.feedback import pseudonym, pseudonym_secret

        route = read_route(self.site.database, self.key)
        name = pseudonym(pseudonym_secret(self.site.settings), "default", user)
        made = assign_request(route.live, route.salt, "default", user=name, session=None, request="r")
        return made.arm == "candidate"

    def _captured(self) -> int:
        query = sa.select(sa.func.count()).where(events.c.kind == "interaction", events.c.agent == self.key.agent)
        with self.site.database.connect() as connection:
            return connection.execute(query).scalar() or 0

    def resume(self) -> None:
        """Let the candidate's streams go on."""
        self.site.engine.behaviours[f"{self.key.agent}-bad"].paused = False

    def decided(self) -> Any:
        """The event of the last decision of this rollout."""
        found = list(EventLog(self.site.database).scan(kinds=["rollout.decision"]))
        return next(r for r in reversed(found) if r.event.body["rollout_id"] == self.rollout.rollout_id)

    def arms(self, url: str) -> set[str]:
        body = {"model": self.key.agent, "messages": [{"role": "user", "content": "?"}]}
        with httpx.Client(headers=self.site.headers, timeout=60) as client:
            answers = [client.post(f"{url}/v1/chat/completions", json=body | {"user": f"user-{n}"}) for n in range(8)]
        return {answer.headers["x-rayloop-arm"] for answer in answers}


PAUSED = Case("satisfaction", {"paused": True}, says=thumb)
"""Streams of this candidate do not end before `Trial.resume`."""


class OpenStream(threading.Thread):
    """A stream of the candidate; made once its first piece is there."""

    def __init__(self, trial: Trial, url: str) -> None:
        super().__init__()
        self.url, self.headers = url, trial.site.headers
        user = next(f"user-{n}" for n in range(USERS) if trial.is_candidate(f"user-{n}"))
        messages = [{"role": "user", "content": "?"}]
        self.asked = {"model": trial.key.agent, "messages": messages, "user": user, "stream": True}
        self.arm, self.pieces = "", b""
        self._opened = threading.Event()
        self.start()
        assert self._opened.wait(60)

    def run(self) -> None:
        path = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", path, json=self.asked, headers=self.headers, timeout=60) as reply:
            self.arm = reply.headers["x-rayloop-arm"]
            for piece in reply.iter_bytes():
                self.pieces += piece
                self._opened.set()

    @property
    def is_whole(self) -> bool:
        return self.pieces.endswith(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("guardrails") / "home", poll_ms=50) as opened:
        yield opened


@contextmanager
def open_site(home: Path, *, poll_ms: int | None) -> Iterator[Site]:
    """Both routers and the engine; `poll_ms` is how often routers read the database, the default if `None`."""
    serve: dict[str, Any] = {"fallback": {"budget_s": 60, "min_budget_s": 60}}
    serve |= {"breaker": {"consecutive": 100_000, "window_share": 1.0}}
    serve |= {} if poll_ms is None else {"poll_ms": poll_ms}
    settings = load_settings(home=home, serve=serve, **LEARNING)[0]
    database = connect(settings)
    secret = create_key(database, "test", "default", "default", ["chat", "feedback"])
    engine = Engine()
    with Server(engine) as engine.url:
        apps = [RouterApp(settings, default_engine_url=engine.url) for _ in range(2)]
        with Server(apps[0], lifespan="on") as one, Server(apps[1], lifespan="on") as other:
            yield Site(settings, database, engine, [one, other], secret)
    database.dispose()


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.metric}-{case.code}") for case in CASES])
def test_a_planted_regression_is_rolled_back_on_every_replica_and_says_why(site: Site, case: Case) -> None:
    trial = site.begin(case)
    trial.run()
    assert [trial.arms(url) for url in site.urls] == [{"stable"}, {"stable"}]
    route = read_route(site.database, trial.key)
    assert (route.stable, route.candidate, route.share) == (f"{trial.key.agent}/1", None, 0.0)
    recorded = trial.decided()
    body = recorded.event.body
    assert (body["outcome"], body["evidence"]["decision"]["code"]) == ("rollback", case.code)
    if case.code == "guardrail":
        assert body["reason"].startswith(f"{case.metric} is worse: ")
        (reading,) = body["evidence"]["evidence"]["guardrails"]
        assert reading["metric"] == case.metric and reading["harm_low"] > 0 and reading["harm"] > reading["margin"]
    assert trial.registry.tags[trial.candidate, "rayloop.rolled_back"] == body["reason"]
    noted = json.loads(trial.registry.tags[trial.candidate, "rayloop.rollout_decision"])
    assert noted["reason"] == body["reason"] and (case.code != "guardrail" or case.metric in noted["metrics"])
    told = notice(recorded)
    assert told is not None and told.severity == "page" and body["reason"] in told.text
    assert verify_decisions(site.database).faults == []


def test_a_rollback_during_a_drain_reaches_the_draining_router_and_open_streams_end_whole(site: Site) -> None:
    """A third router is told to end while a stream of the candidate is open: it drains, and still follows the route."""
    trial = site.begin(PAUSED)
    app = RouterApp(site.settings, default_engine_url=site.engine.url)
    app.watcher.refresh()
    draining = Server(app, lifespan="on", drain_s=60)
    with draining as url:
        stream = OpenStream(trial, url)
        draining.stop()
        trial.run()
        known = app.watcher.current.routes[trial.key]
        assert (known.candidate, known.live) == (None, ())
        assert is_served(site.database, read_route(site.database, trial.key), site.settings.serve.live_after_s)
        trial.resume()
        stream.join()
    assert [trial.arms(url) for url in site.urls] == [{"stable"}, {"stable"}]
    assert stream.arm == "candidate" and stream.is_whole
