"""The router where it lives: two replicas on Ray Serve behind its ingress, started by `rayloop up`.

Load runs the whole time; no request of it may fail, whatever is written, deployed or mended meanwhile.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from sqlalchemy.engine import Engine as Database

from cluster.database import connect
from cluster.settings import Settings, load_settings
from data.log import EventLog
from serve.applications.document import Application, application_name
from serve.applications.http_json import Api
from serve.applications.serve_rest import ServeRestDriver
from serve.routes import read_route, update_route
from tests.serve.conftest import KEY, LEARNING, serve_version
from tests.serve.upstream import Engine, Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROJECT = Path(__file__).parents[2]
REPLICAS = 2
CANDIDATE = "triage-2-abababababab"
PATIENCE_S = 4.0
"""With clients that neither read nor send."""
ROW_BOUND_S = 2.0
"""From the write of a route's row until every replica follows it, whoever wrote it."""


@dataclass
class Up:
    """What `rayloop up` started."""

    home: Path
    config: Path
    api: str
    dashboard: str
    secret: str
    database: Database
    settings: Settings
    engine: Engine

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    def document(self) -> dict[str, Any]:
        """The Serve config as `rayloop up` wrote it, or as it was last deployed."""
        found: dict[str, Any] = yaml.safe_load((self.home / "serve.yaml").read_text())
        return found

    def deploy(self, *, by_command: bool = False, **route: Any) -> None:
        """Edit the route in the Serve config and deploy it, as a person does or a pipeline."""
        document = self.document()
        document["applications"][0]["deployments"][0]["user_config"] = {"routes": [{"agent": "triage"} | route]}
        (self.home / "serve.yaml").write_text(yaml.safe_dump(document))
        if not by_command:
            return self.put(document)
        serve = Path(sys.executable).with_name("serve")
        command = [serve, "deploy", "-a", self.dashboard, self.home / "serve.yaml"]
        subprocess.run(command, check=True, capture_output=True, cwd=PROJECT, timeout=120)

    def put(self, document: dict[str, Any]) -> None:
        """What `serve deploy` sends, without the seconds its process takes."""
        httpx.put(f"{self.dashboard}/api/serve/applications/", json=document, timeout=60).raise_for_status()

    def deployed_at(self) -> float:
        """When the deployment config wrote the row, on this process's monotonic clock; waits for it."""
        until(lambda: read_route(self.database, KEY).updated_by == "config")
        return read_route(self.database, KEY).updated_at_us / 1e6 - (time.time() - time.monotonic())

    def route(self, **change: Any) -> None:
        update_route(self.database, KEY, change, writer="person:test")

    @property
    def applications(self) -> dict[str, Any]:
        """What Ray Serve says of each application."""
        reply = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=60)
        reply.raise_for_status()
        found: dict[str, Any] = reply.json()["applications"]
        return found

    def chat_stream_arm(self) -> str:
        """The arm of a stream that is given up at once."""
        request = {"model": "triage", "messages": [{"role": "user", "content": "?"}], "stream": True}
        with httpx.stream("POST", f"{self.api}/chat/completions", json=request, headers=self.headers) as reply:
            return reply.headers["x-rayloop-arm"]

    def chat(self, model: str = "triage") -> httpx.Response:
        request = {"model": model, "messages": [{"role": "user", "content": "?"}], "user": "ann"}
        return httpx.post(f"{self.api}/chat/completions", json=request, headers=self.headers, timeout=30)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = tmp_path_factory.mktemp("live") / "home"
    engine = Engine()
    with Server(engine) as engine_url:
        serve = {
            "port": 0, "applications": ["gateway"], "router_replicas": REPLICAS,
            "engines": {"local": {"base_url": engine_url}}, "allowed_hosts": ["127.0.0.1"],
            "body_timeout_s": PATIENCE_S, "write_timeout_s": PATIENCE_S,
        }  # fmt: skip
        config = home.with_name("rayloop.yaml")
        patience = {name: {"body_timeout_s": PATIENCE_S} for name in ("engine", "grader", "tools")}
        config.write_text(yaml.safe_dump({"home": str(home), "serve": serve} | LEARNING | patience))
        settings, _ = load_settings(config)
        database = connect(settings)
        serve_version(database, "triage/1", "base")
        serve_version(database, "triage/2", "triage-2-abababababab")
        update_route(database, KEY, {"stable": "triage/1", "candidate": "triage/2"}, writer="person:test")
        result = json.loads(rayloop("up", "--json", "--config", str(config)))
        try:
            secret = (home / "run" / "api_key").read_text().strip()
            urls = result["urls"]
            yield Up(home, config, urls["api"], urls["dashboard"], secret, database, settings, engine)
        finally:
            rayloop("down", "--config", str(config))
            database.dispose()


def rayloop(*arguments: str) -> str:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Load:
    """Requests by many users, with the version that answered each."""

    answers: list[tuple[float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, up: Up) -> None:
        with httpx.Client(headers=up.headers, timeout=30) as client:
            while not self.stopping.is_set():
                request = {
                    "model": "triage",
                    "messages": [{"role": "user", "content": "?"}],
                    "user": uuid.uuid4().hex,
                }
                began = time.monotonic()
                try:
                    response = client.post(f"{up.api}/chat/completions", json=request)
                    response.raise_for_status()
                    self.answers.append((began, response.headers["x-rayloop-version"]))
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                time.sleep(0.005)

    def wait_until(self, happened: Callable[[list[str]], bool], since: float, within_s: float) -> float:
        """Seconds after `since` from which on every answer satisfies `happened`."""
        deadline = since + within_s
        while time.monotonic() < deadline:
            time.sleep(0.3)
            recent = [version for began, version in self.answers if began > time.monotonic() - 0.6]
            if len(recent) > 10 and happened(recent):
                others = [began for began, version in self.answers if began > since and not happened([version])]
                return max(others, default=since) - since
        pytest.fail(f"not within {within_s} s: {set(self.answers[-20:])}; failures {self.failures[:3]}")


@contextmanager
def load(up: Up, threads: int = 3) -> Iterator[Load]:
    running = Load()
    workers = [threading.Thread(target=running.run, args=(up,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        time.sleep(0.5)
        yield running
    finally:
        running.stopping.set()
        for worker in workers:
            worker.join()
    assert running.failures == []
    assert len(running.answers) > 20


def everyone_on(version: str) -> Callable[[list[str]], bool]:
    return lambda versions: set(versions) == {version}


def test_written_row_reaches_every_replica_within_two_seconds(up: Up) -> None:
    with load(up) as running:
        for share, version in ((1.0, "triage/2"), (0.0, "triage/1")):
            written = time.monotonic()
            up.route(share=share)
            assert running.wait_until(everyone_on(version), written, 10) <= ROW_BOUND_S


def test_edited_share_and_serve_deploy_move_traffic_without_a_failed_request(up: Up) -> None:
    with load(up) as running:
        up.deploy(stable="triage/1", candidate="triage/2", share=1.0, by_command=True)
        assert running.wait_until(everyone_on("triage/2"), up.deployed_at(), 20) <= ROW_BOUND_S
        up.route(share=0.0)
        running.wait_until(everyone_on("triage/1"), time.monotonic(), 10)
        up.deploy(stable="triage/1", candidate="triage/2", share=1.0)  # the same file again
        time.sleep(2)
        running.wait_until(everyone_on("triage/1"), time.monotonic(), 3)
    assert (read_route(up.database, KEY).share, read_route(up.database, KEY).updated_by) == (
        0.0,
        "person:test",
    )


def test_broken_config_is_rejected_with_its_reason_while_traffic_goes_on(up: Up) -> None:
    before = read_route(up.database, KEY)
    with load(up) as running:
        up.deploy(stable="triage/1", share=2.0)
        deadline = time.monotonic() + 20
        while not (rejected := EventLog(up.database).read(kinds=["config.rejected"])) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "routes.0.share=2.0" in rejected[0].event.body["reason"]
        status = httpx.get(f"{up.api}/agents/status", headers=up.headers).json()
        assert "share=2.0" in status["config_rejected"]
        running.wait_until(everyone_on(before.stable), time.monotonic(), 5)
    assert read_route(up.database, KEY).revision == before.revision


def test_slow_clients_and_floods_of_headers_hold_up_nobody(up: Up) -> None:
    host, port = up.api.removeprefix("http://").removesuffix("/v1").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(100)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
            if number % 2:  # a whole head, and a body that never comes
                connection.sendall(f"authorization: Bearer {up.secret}\r\ncontent-length: 500\r\n\r\n{{".encode())
        with load(up) as running:
            for headers in ({f"x-{n}": "y" for n in range(5_000)}, {"x-long": "y" * 1_000_000}):
                with socket.create_connection((host, int(port)), timeout=20) as flood:
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                    with contextlib.suppress(OSError):
                        flood.sendall(f"GET /healthz HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode())
                    with contextlib.suppress(OSError):
                        assert not flood.recv(100).startswith(b"HTTP/1.1 200")
            served, deadline = len(running.answers), time.monotonic() + 30
            while len(running.answers) < served + 20 and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        for connection in slow:
            connection.close()


def test_a_candidate_on_another_base_model_comes_and_goes_and_nothing_else_is_touched(up: Up) -> None:
    """The driver adds a copy of the application `engine`; users reach it by their route; it is taken down again."""
    document = up.document()
    template = {"name": "engine", "route_prefix": "/engine", "import_path": "tests.serve.tiny_engine:build"}
    document["applications"].append(template)
    up.put(document)
    driver = ServeRestDriver(Api(up.dashboard, 60), "engine")
    other = Application(application_name("other/base", "r1"), "other/base")
    routers = router_pids(up)
    until(lambda: up.applications["engine"]["status"] == "RUNNING")
    with load(up) as running:
        until(lambda: driver.apply([other]).get(other.name, ("absent", ""))[0] == "ready")
        serve_version(up.database, "triage/3", "base", other.name)
        up.route(candidate="triage/3", share=1.0)
        running.wait_until(everyone_on("triage/3"), time.monotonic(), 30)
        assert up.chat().json()["choices"][0]["message"]["content"] == "other/base"
        up.route(candidate="triage/2", share=0.0)
        running.wait_until(everyone_on("triage/1"), time.monotonic(), 30)
        driver.apply([])
        until(lambda: other.name not in up.applications)
    assert set(up.applications) == {"gateway", "engine"}
    assert router_pids(up) == routers


@pytest.mark.parametrize("by", ["row", "config"])
def test_a_rollback_reaches_a_draining_replica_and_its_open_streams_end_whole(up: Up, by: str) -> None:
    """One of two routers is taken away while the candidate's streams are open; then everybody is sent to stable."""
    behaviour = up.engine.behaviours["triage-2-abababababab"]
    behaviour.paused = True
    up.route(candidate="triage/2", share=1.0)
    until(lambda: up.chat_stream_arm() == "candidate")
    request = {"model": "triage", "messages": [{"role": "user", "content": "?"}], "stream": True}
    ends: list[bytes] = []

    def read() -> None:
        with httpx.stream("POST", f"{up.api}/chat/completions", json=request, headers=up.headers, timeout=120) as reply:
            ends.append(b"".join(reply.iter_bytes())[-14:])

    before = len(up.engine.requests)
    streams = [threading.Thread(target=read) for _ in range(8)]
    for stream in streams:
        stream.start()
    until(lambda: len(up.engine.requests) >= before + 8)
    document = up.document()
    document["applications"][0]["deployments"][0]["num_replicas"] = 1
    up.put(document)
    with load(up) as running:
        written = time.monotonic()
        if by == "row":
            up.route(share=0.0)
        else:
            declared = {"agent": "triage", "stable": "triage/1", "candidate": "triage/2", "share": 0.0}
            document["applications"][0]["deployments"][0]["user_config"] = {"routes": [declared]}
            up.put(document)
            written = up.deployed_at()
        assert running.wait_until(everyone_on("triage/1"), written, 10) <= ROW_BOUND_S
        behaviour.paused = False
        for stream in streams:
            stream.join()
    assert ends == [b"data: [DONE]\n\n"] * 8
    document["applications"][0]["deployments"][0]["num_replicas"] = REPLICAS
    up.put(document)
    until(lambda: len(replicas_of(up)) == REPLICAS)


def test_client_that_leaves_in_mid_stream_stops_the_engine_through_the_ingress(up: Up) -> None:
    up.engine.behaviours["base"].gap_s = 0.5
    before = up.engine.cut_off
    request = {"model": "triage", "messages": [{"role": "user", "content": "?"}], "stream": True}
    with httpx.stream("POST", f"{up.api}/chat/completions", json=request, headers=up.headers, timeout=20) as response:
        next(response.iter_bytes())
    deadline = time.monotonic() + 10
    while up.engine.cut_off == before and time.monotonic() < deadline:
        time.sleep(0.05)
    up.engine.behaviours["base"].gap_s = 0.0
    assert up.engine.cut_off == before + 1
    interaction = response.headers["x-rayloop-interaction"]
    while time.monotonic() < deadline:
        found = [r for r in EventLog(up.database).scan(kinds=["interaction"]) if r.event.interaction_id == interaction]
        if found:
            break
        time.sleep(0.05)
    assert found[0].event.body["flags"]["disconnected"] is True


def test_client_that_does_not_read_is_let_go_by_the_ingress_too(up: Up) -> None:
    host, port = up.api.removeprefix("http://").removesuffix("/v1").split(":")
    behaviour = up.engine.behaviours["base"]
    behaviour.raw_pieces = [b'data: {"choices": [{"delta": {"content": "' + b"x" * 400_000 + b'"}}]}\n\n'] * 80
    body = json.dumps({"model": "triage/1", "messages": [{"role": "user", "content": "?"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {up.secret}\r\n"
    before = len(up.engine.requests)
    try:
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: len(up.engine.requests) > before)
            assert is_held(client)
            until(lambda: not is_held(client))
    finally:
        behaviour.raw_pieces = None


def test_client_whose_head_does_not_end_is_let_go(up: Up) -> None:
    host, port = up.api.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nx-slow: ")
        began = time.monotonic()
        while is_held(client):
            assert time.monotonic() - began < 4 * PATIENCE_S
            with contextlib.suppress(OSError):
                client.sendall(b"a")
            time.sleep(PATIENCE_S / 20)


def is_held(client: socket.socket) -> bool:
    """Whether somebody here keeps the other end of a connection open."""
    own = client.getsockname()[1]
    found = psutil.net_connections("tcp")
    return any(c.raddr and c.raddr.port == own and c.status == psutil.CONN_ESTABLISHED for c in found)


def test_client_that_waits_for_a_slow_answer_is_not_let_go(up: Up) -> None:
    behaviour = up.engine.behaviours["base"]
    behaviour.delay_s = 2 * PATIENCE_S
    try:
        assert up.chat("triage/1").status_code == 200
    finally:
        behaviour.delay_s = 0.0


def test_huge_body_is_413_through_the_ingress(up: Up) -> None:
    request = {"model": "triage", "messages": [{"role": "user", "content": "x" * 20_000_000}]}
    response = httpx.post(f"{up.api}/chat/completions", json=request, headers=up.headers, timeout=20)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert response.headers.get_list("x-request-id") == [response.headers["x-request-id"]]


def test_kill_nine_of_a_router_under_load_loses_no_acknowledged_feedback(up: Up) -> None:
    acknowledged: list[str] = []
    stopping = threading.Event()

    def send() -> None:
        with httpx.Client(headers=up.headers, timeout=10) as client:
            while not stopping.is_set():
                event_id = uuid.uuid4().hex
                item = {
                    "event_id": event_id,
                    "interaction_id": "chatcmpl-x",
                    "type": "thumbs_up",
                    "user": "ann",
                }
                try:
                    response = client.post(f"{up.api}/feedback", json=item)
                    if response.status_code == 200 and response.json()["data"][0]["status"] == "accepted":
                        acknowledged.append(event_id)
                except (httpx.HTTPError, json.JSONDecodeError):
                    pass  # not acknowledged

    threads = [threading.Thread(target=send) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        os.kill(router_pids(up)[0], signal.SIGKILL)
        time.sleep(3)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    logged = [r.event.event_id for r in EventLog(up.database).scan(kinds=["feedback"])]
    assert len(acknowledged) > 100
    assert set(acknowledged) <= set(logged)
    assert len(logged) == len(set(logged))


def replicas_of(up: Up) -> list[int]:
    record = json.loads((up.home / "run" / "up.json").read_text())
    family = psutil.Process(record["pids"]["supervisor"]).children(recursive=True)
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ServeReplica:gateway:Router" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def router_pids(up: Up) -> list[int]:
    """Processes of the routers once all of them run: one that drains still lives, and its successor may not yet."""
    until(lambda: up.applications["gateway"]["status"] == "RUNNING" and len(replicas_of(up)) == REPLICAS)
    return replicas_of(up)


def until(condition: Callable[[], bool], within_s: float = 120.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_up_refuses_a_second_one_and_says_where_the_first_is(up: Up) -> None:
    command = [sys.executable, "-m", "cluster.cli", "up", "--config", str(up.config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert up.api in done.stderr
