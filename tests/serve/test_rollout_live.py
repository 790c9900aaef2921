"""The commands and the control application against a real registry, real tables and a real HTTP server."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from sqlalchemy.engine import Engine

from cluster.cli import run_app
from cluster.clock import now_us
from cluster.database import connect
from cluster.errors import UnavailableError
from cluster.registry import GATES_TAG, Registry
from cluster.settings import Settings, load_settings
from cluster.tables import servable_replicas
from data.outlets.notices import notice
from serve.control import ControlApi, ControlLoop
from serve.experiments.cli import app as experiment_app
from serve.keys import create_key, digest_of, list_keys
from serve.known_keys import KnownKeys
from serve.replicas import ReplicaReport
from serve.rollout.cli import app as rollout_app
from serve.rollout.live import HttpRouters, LiveServables, OwnKeys
from serve.rollout.store import list_rollouts
from serve.routes import Route, RouteKey, read_route, write_route
from serve.servables import list_servables
from tests.serve.rollout_world import Population, World, demo_settings


class FakeRouter(BaseHTTPRequestHandler):
    """Answers as the router does."""

    broken = False
    is_known = True
    asked: ClassVar[list[list[str]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append([m["content"] for m in body["messages"]])
        if self.broken:
            self._send(502, {"error": {"message": "the engine is gone"}})
        else:
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": "OK."}}]})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status if self.headers.get("authorization") and self.is_known else 401)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def live(mlflow_settings: Settings, tmp_path: Path) -> Iterator[tuple[Settings, Engine]]:
    """Two registered versions (the second has passed its gates), a route, and a router over HTTP."""
    home = mlflow_settings.home
    engine = connect(mlflow_settings)
    FakeRouter.broken = False
    FakeRouter.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeRouter)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    rollout = {
        "smoke_conversations": [["Say OK.", "Say it again."]],
        "router_url": url,
        "tick_s": 0.05,
        "stage_duration_s": 60,
    }
    beats = {"live_after_s": 600}  # nobody's heart beats here
    document = {"home": str(home), "rollout": rollout, "engine": beats, "serve": beats}
    (tmp_path / "rayloop.yaml").write_text(yaml.safe_dump(document))
    registry = Registry(mlflow_settings)
    for number in (1, 2):
        base = tmp_path / f"base-{number}"
        base.mkdir()
        (base / "config.json").write_text(json.dumps({"n": number}))
        registry.register_base("triage", base)
    registry.tag("triage/2", GATES_TAG, "passed")
    write_route(engine, RouteKey("default", "triage"), {"stable": "triage/1"}, expected_revision=0, writer="person:ann")
    serving(engine, RouteKey("default", "triage"), 1000)
    yield load_settings(tmp_path / "rayloop.yaml")[0], engine
    server.shutdown()
    server.server_close()
    thread.join()
    engine.dispose()


def command(app: Any, settings: Settings, *arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process, as `rayloop` does; its JSON, or its one line of failure."""
    config = settings.home.parent / "rayloop.yaml"
    capsys.readouterr()
    try:
        run_app(app, [*arguments, "--config", str(config), "--json"], "rayloop")
    except SystemExit as end:
        if end.code:
            return capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def say_ready(engine: Engine, version: str, state: str = "ready", reason: str | None = None) -> None:
    """What an engine replica reports."""
    with engine.begin() as connection:
        connection.execute(servable_replicas.delete())
        for reported in ("", version):
            connection.execute(
                servable_replicas.insert().values(
                    engine="local", replica_id="r1", version=reported, state=state if reported else "ready",
                    reason=reason, heartbeat_us=now_us(),
                )
            )  # fmt: skip


def serving(engine: Engine, key: RouteKey, revision: int, replica: str = "router-1") -> None:
    """What a router replica reports."""
    route = Route(key.tenant, key.agent, key.modality, "triage/1", revision=revision)
    ReplicaReport(replica, 600).tell(engine, {key: route})


def until(condition: Any, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_start_status_approve_freeze_and_rollback_by_command(
    live: tuple[Settings, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, engine = live
    started = command(rollout_app, settings, "start", "triage/2", capsys=capsys)
    rollout_id = started["rollout_id"]
    assert (started["state"], started["candidate"], started["share"]) == ("pending", "triage/2", 0.0)
    loop = ControlLoop(settings)
    loop.start()
    try:
        until(lambda: list_servables(engine))
        say_ready(engine, "triage/2")
        until(lambda: read_route(engine, RouteKey("default", "triage")).share == 0.1)
        until(lambda: command(rollout_app, settings, "status", rollout_id, capsys=capsys)["state"] == "running")
        assert command(rollout_app, settings, "freeze", capsys=capsys)["state"] == "holding"
        assert command(rollout_app, settings, "approve", rollout_id, capsys=capsys)["approved_stage"] == 1
        assert command(rollout_app, settings, "unfreeze", "triage", capsys=capsys)["frozen_by"] is None
        taken = command(rollout_app, settings, "rollback", rollout_id, "--reason", "enough", capsys=capsys)
        assert (taken["state"], taken["outcome"]) == ("rolled_back", "keep")
        tags = Registry(settings).get("triage/2").tags
        assert tags["rayloop.rolled_back"].endswith("enough")
        noted = json.loads(tags["rayloop.rollout_decision"])
        assert (noted["outcome"], noted["rollout_id"]) == ("rollback", rollout_id)
        assert not any(servable.wanted for servable in list_servables(engine))
        assert loop.health()["status"] == "ok"
    finally:
        loop.stop()
    assert not [key for key in list_keys(engine) if key.name == "rollout-controller" and key.revoked_at_us is None]
    listed = command(experiment_app, settings, "list", capsys=capsys)["experiments"]
    shown = command(experiment_app, settings, "show", listed[0]["experiment_id"], capsys=capsys)
    assert shown["split"]["users"] == {"candidate": 0, "stable": 0}


def test_a_guardrails_reason_and_evidence_are_in_the_log_in_mlflow_and_in_the_notification(
    live: tuple[Settings, Engine],
) -> None:
    settings, engine = live
    registry = Registry(settings)
    world = World(engine, demo_settings(), Population(accuracy={"stable": 0.65, "candidate": 0.05}, seed=5))
    world.steps.steps.versions = registry
    rollout = world.run(world.start().rollout_id)
    assert (rollout.state, rollout.experiment.outcome) == ("rolled_back", "rejected_by_guardrail")
    recorded = list(world.log.scan(kinds=["rollout.decision"]))[-1]
    body = recorded.event.body
    metric, _, rest = body["reason"].partition(" is worse: ")
    assert body["outcome"] == "rollback" and rest
    evidence = body["evidence"]["evidence"]
    readings = [evidence["primary"], *evidence["guardrails"], *evidence["optional_guardrails"]]
    [reading] = [own for own in readings if own["metric"] == metric]
    assert reading["harm_low"] > 0 and reading["harm"] > reading["margin"]
    tags = Registry(settings).get("triage/2").tags
    assert tags["rayloop.rolled_back"] == body["reason"]
    noted = json.loads(tags["rayloop.rollout_decision"])
    assert (noted["rollout_id"], noted["outcome"], noted["reason"]) == (rollout.rollout_id, "rollback", body["reason"])
    harm = [reading["harm_low"], reading["harm"], reading["harm_high"]]
    assert noted["metrics"][metric]["harm"] == harm
    told = notice(recorded)
    assert told is not None and told.severity == "page" and body["reason"] in told.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start", "triage/1"], "already stable"),
        (["start", "triage/7"], "no version 'triage/7'"),
        (["start", "triage/2", "--agent", "sales"], "route sales (text, tenant default) does not exist"),
        (["start", "triage/1", "--override-gates"], "is needed to override the gates"),
        (["start", "triage/2", "--stage-share", "0.5"], "must contain significant_improvement"),
        (["status", "ro-nothing"], "no rollout ro-nothing"),
        (["rollback"], "no rollout is live"),
    ],
)
def test_wrong_commands_fail_with_one_line(
    live: tuple[Settings, Engine], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    settings, engine = live
    if arguments[:2] == ["start", "triage/1"]:
        Registry(settings).tag("triage/1", GATES_TAG, "passed")
    failure = command(rollout_app, settings, *arguments, capsys=capsys)
    assert message in failure and failure.count("\n") == 1
    assert list_rollouts(engine, "default") == []


def test_gates_stop_a_start(live: tuple[Settings, Engine], capsys: pytest.CaptureFixture[str]) -> None:
    settings, _ = live
    Registry(settings).tag("triage/2", GATES_TAG, "failed")
    assert "has gates failed; run `rayloop evaluate" in command(
        rollout_app, settings, "start", "triage/2", capsys=capsys
    )
    options = ["--override-gates", "--reason", "to show a rollback", "--stage-duration-s", "3"]
    started = command(rollout_app, settings, "start", "triage/2", *options, capsys=capsys)
    assert started["gates_override"] == "to show a rollback"


def test_a_candidate_that_an_engine_refuses_fails_the_rollout(
    live: tuple[Settings, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, engine = live
    command(rollout_app, settings, "start", "triage/2", capsys=capsys)
    loop = ControlLoop(settings)
    loop.start()
    try:
        until(lambda: list_servables(engine))
        say_ready(engine, "triage/2", "failed", "rank 128 is over 64")
        until(lambda: list_rollouts(engine, "default")[0].state == "failed")
    finally:
        loop.stop()
    assert "rank 128 is over 64" in str(list_rollouts(engine, "default")[0].reason)


def test_readiness_follows_the_replicas(live: tuple[Settings, Engine]) -> None:
    settings, engine = live
    servables = LiveServables(engine, Registry(settings), settings)
    assert servables.status("triage/2")[0] == "absent"
    servables.want("triage/2")
    assert servables.status("triage/2")[0] == "loading"
    say_ready(engine, "triage/2")
    assert servables.status("triage/2") == ("ready", "")
    say_ready(engine, "triage/2", "failed", "digest differs")
    assert servables.status("triage/2") == ("failed", "digest differs")


def test_candidates_are_tried_over_http(live: tuple[Settings, Engine]) -> None:
    settings, engine = live
    keys = OwnKeys(engine, settings)
    routers = HttpRouters(engine, str(settings.rollout.router_url), settings, keys)
    route = read_route(engine, RouteKey("default", "triage"))
    assert routers.smoke(route, "triage/2") is None
    assert FakeRouter.asked == [["Say OK."], ["Say OK.", "OK.", "Say it again."]]
    FakeRouter.broken = True
    assert "HTTP 502" in str(routers.smoke(route, "triage/2"))
    nowhere = HttpRouters(engine, "http://127.0.0.1:9", settings, keys)
    assert "refused" in str(nowhere.smoke(route, "triage/2"))


def test_a_router_that_does_not_know_the_key_yet_costs_no_attempt(
    live: tuple[Settings, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, engine = live
    routers = HttpRouters(engine, str(settings.rollout.router_url), settings, OwnKeys(engine, settings))
    monkeypatch.setattr(FakeRouter, "is_known", False)
    with pytest.raises(UnavailableError, match="do not know the controller's key"):
        routers.smoke(read_route(engine, RouteKey("default", "triage")), "triage/2")


def test_a_controller_makes_its_key_at_its_start_and_revokes_no_others(live: tuple[Settings, Engine]) -> None:
    settings, engine = live
    dying, successor = OwnKeys(engine, settings), OwnKeys(engine, settings)
    assert len(list_keys(engine)) == 2 and all(key.expires_at_us for key in list_keys(engine))
    dying.close()
    (kept,) = (key for key in list_keys(engine) if key.revoked_at_us is None)
    assert kept.digest == digest_of(successor(read_route(engine, RouteKey("default", "triage"))))


def ask(api: ControlApi, path: str, secret: str | None = None, method: str = "GET") -> tuple[int, Any]:
    """One request to an ASGI callable that answers in JSON."""
    status, body = answer_of(api, path, secret, method)
    return status, json.loads(body)


def answer_of(api: ControlApi, path: str, secret: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    """Status and body of one request."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    headers = [(b"authorization", f"Bearer {secret}".encode())] if secret else []
    scope = {"type": "http", "method": method, "path": f"/control{path}", "root_path": "/control", "headers": headers}
    asyncio.run(api(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_control_shows_its_health_and_the_rollouts_of_the_keys_tenant(
    live: tuple[Settings, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, engine = live
    command(rollout_app, settings, "start", "triage/2", capsys=capsys)
    loop = ControlLoop(settings)
    api = ControlApi(loop, KnownKeys(settings, 0.0))
    mine = create_key(engine, "ann", "default", "default")
    other = create_key(engine, "eve", "other", "default")
    admin, foreign = (create_key(engine, "root", tenant, "default", ["admin"]) for tenant in ("default", "other"))
    assert ask(api, "/healthz")[0] == 503
    loop.start()
    try:
        until(lambda: ask(api, "/healthz")[0] == 200)
        assert [r["candidate"] for r in ask(api, "/rollouts", mine)[1]["data"]] == ["triage/2"]
        assert ask(api, "/rollouts", other)[1]["data"] == []
        assert ask(api, "/rollouts")[0] == 401
        assert ask(api, "/nothing")[0] == 404
        assert [ask(api, "/metrics", secret)[0] for secret in (None, mine, foreign)] == [401, 403, 403]
        status, metrics = answer_of(api, "/metrics", admin)
        assert status == 200 and b"# TYPE rayloop_outlet_delivered_total counter" in metrics
        assert ask(api, "/rollouts", mine, "POST")[0] == 405
    finally:
        loop.stop()


def test_the_planner_answers_in_users_and_days(
    live: tuple[Settings, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, _ = live
    found = command(
        experiment_app, settings, "plan", "--probability", "0.7", "--margin", "0.03", "--share", "0.1",
        "--users-per-day", "1000", capsys=capsys,
    )  # fmt: skip
    assert (found["candidate"], found["control"], found["days"]) == (1603, 14426, 16.0)
    assert "needs one of" in command(experiment_app, settings, "plan", "--margin", "1", capsys=capsys)
    wrong = command(experiment_app, settings, "plan", "--margin", "0", "--probability", "0.7", capsys=capsys)
    assert wrong.startswith("error: margin=0.0 must be above 0")
