"""From wanted versions to applications and back, and Ray Serve's REST API through a double of it over HTTP."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.errors import ConfigError, ConflictError, UnavailableError
from cluster.registry import Version
from cluster.settings import load_settings
from cluster.tables import servables
from serve.applications.document import PREFIX, Application, application_name
from serve.applications.driver import Applications, Said, wanted_applications
from serve.applications.http_json import Api
from serve.applications.serve_rest import ServeRestDriver
from serve.config import read_settings
from serve.rollout.live import LiveServables, applications
from serve.servables import unwant
from serve.snapshot import read_snapshot

NAME = application_name("meta/llama", "r1")
LLAMA = Application(NAME, "meta/llama")


class Dashboard(BaseHTTPRequestHandler):
    """As much of Ray Serve's REST API as the driver uses."""

    details: dict[str, Any]
    puts: list[dict[str, Any]]
    status = 200

    def do_GET(self) -> None:
        self._send(self.status, self.details if self.status == 200 else {"error": "later"})

    def do_PUT(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.puts.append(document)
        known = self.details["applications"]
        self.details["applications"] = {
            a["name"]: known.get(a["name"], {"status": "DEPLOYING", "message": ""}) | {"deployed_app_config": a}
            for a in document["applications"]
        }
        self._send(200, {})

    def _send(self, status: int, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def rest() -> Iterator[tuple[type[Dashboard], ServeRestDriver]]:
    config = {"name": "engine", "route_prefix": "/engine", "import_path": "serve.app:engine", "args": {"settings": "f"}}
    deployed = {"status": "RUNNING", "message": "", "deployed_app_config": config}
    by_code = {"status": "RUNNING", "message": "", "deployed_app_config": None}
    details = {
        "proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": 8123}, "target_capacity": None,
        "applications": {"engine": deployed, "mine": by_code},
    }  # fmt: skip
    state = type("State", (Dashboard,), {"details": details, "puts": [], "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), state)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state, ServeRestDriver(Api(f"http://127.0.0.1:{server.server_address[1]}", 5), "engine")
    server.shutdown()
    server.server_close()
    thread.join()


def test_serves_rest_api_gets_the_whole_document_and_only_when_it_differs(
    rest: tuple[type[Dashboard], ServeRestDriver],
) -> None:
    state, driver = rest
    assert driver.apply([]) == {} and state.puts == []
    driver.apply([LLAMA])
    assert driver.apply([LLAMA]) == {NAME: ("loading", "DEPLOYING")}
    (put,) = state.puts
    assert (put["proxy_location"], put["http_options"]["port"]) == ("HeadOnly", 8123)
    assert [a["name"] for a in put["applications"]] == ["engine", NAME]
    assert put["applications"][1]["args"] == {"settings": "f", "engine": NAME, "base_model": "meta/llama"}
    state.details["applications"][NAME]["status"] = "RUNNING"
    assert driver.apply([LLAMA]) == {NAME: ("ready", "RUNNING")}
    driver.apply([])
    assert [a["name"] for a in state.puts[-1]["applications"]] == ["engine"]


def test_a_document_that_would_lose_something_is_not_put(rest: tuple[type[Dashboard], ServeRestDriver]) -> None:
    state, driver = rest
    state.status = 503
    with pytest.raises(UnavailableError, match="HTTP 503"):
        driver.apply([LLAMA])
    state.status = 200
    deployed = state.details["applications"]["engine"]["deployed_app_config"]
    deployed["runtime_env"] = {"env_vars": {"SECRET": "<redacted>"}}
    with pytest.raises(ConflictError, match="hides parts"):
        driver.apply([LLAMA])
    state.details["applications"].pop("engine")
    with pytest.raises(UnavailableError, match="no application is deployed by config"):
        driver.apply([LLAMA])
    assert state.puts == []


# What is wanted


def hold(database: Engine, version: str, engine: str, base: str, revision: str, *, at_us: int | None = None) -> None:
    row = {
        "version": version, "engine": engine, "model_name": "m", "base_model": base, "base_revision": revision,
        "wanted": True, "updated_at_us": now_us() if at_us is None else at_us,
    }  # fmt: skip
    with write(database).begin() as connection:
        connection.execute(servables.insert().values(**row))


def test_an_application_is_wanted_while_a_version_is_and_a_little_longer(sqlite_database: Engine) -> None:
    hold(sqlite_database, "triage/1", "local", "base", "b1")
    hold(sqlite_database, "triage/2", NAME, "meta/llama", "r1")
    assert wanted_applications(sqlite_database, 60, now_us()) == [LLAMA]
    unwant(sqlite_database, "triage/2")
    assert wanted_applications(sqlite_database, 60, now_us()) == [LLAMA]
    assert wanted_applications(sqlite_database, 60, now_us() + 61 * SECOND_US) == []


class Fake:
    """A driver that remembers, or fails."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.said: Said = {}

    def apply(self, wanted: Any) -> Said:
        if self.failure is not None:
            raise self.failure
        return self.said


def test_a_candidate_on_another_base_gets_an_application_and_its_status(sqlite_database: Engine) -> None:
    settings = load_settings(rollout={"applications": {"driver": "serve"}})[0]
    driver = Fake()
    registry = Registry()
    held = LiveServables(sqlite_database, registry, settings, Applications(sqlite_database, lambda: driver, 60))  # type: ignore[arg-type]
    held.want("triage/1")  # the first base goes to the configured engine
    registry.base = "meta/llama"
    assert held.status("triage/2")[0] == "absent"
    held.want("triage/2")
    registry.base = "base"
    held.want("triage/3")  # a known base: its engine
    with sqlite_database.connect() as connection:
        rows = {row.version: row.engine for row in connection.execute(servables.select())}
    assert rows == {"triage/1": "local", "triage/2": NAME, "triage/3": "local"}
    driver.failure = UnavailableError("the dashboard is gone")
    held.sync(now_us())
    assert held.status("triage/2") == ("loading", f"application {NAME}: the dashboard is gone")
    driver.failure, driver.said = None, {NAME: ("failed", "no GPU")}
    held.sync(now_us())
    assert held.status("triage/2") == ("failed", f"application {NAME}: no GPU")
    driver.said = {NAME: ("ready", "RUNNING")}
    held.sync(now_us())
    assert held.status("triage/2")[0] == "loading"  # it runs, and holds nothing yet
    assert read_snapshot(sqlite_database, settings.serve.engines).targets["triage/2"].engine == NAME


class Registry:
    """Versions that are base models."""

    base = "base"

    def get(self, ref: str) -> Version:
        model, number = ref.split("/")
        return Version(
            id=ref, model=model, number=int(number), name="v1.2649.1", base_model=self.base, adapter_path=None,
            adapter_sha256=None, rank=None, dataset_hash=None, dataset_id=None, run_id=None,
            tags={"base_revision": "r1"}, aliases=(),
        )  # fmt: skip


def test_names_follow_the_base_model() -> None:
    assert NAME.startswith(PREFIX) and NAME != application_name("meta/llama", "r2") != application_name("x", "r2")


def test_the_engine_application_takes_its_name_and_base_from_its_arguments(tmp_path: Any) -> None:
    file = tmp_path / "rayloop.yaml"
    file.write_text("engine: {replicas: 2, base_model: ours}")
    found = read_settings({"config": str(file), "engine": NAME, "base_model": "meta/llama"}).engine
    assert (found.name, found.base_model, found.replicas) == (NAME, "meta/llama", 2)
    assert read_settings({"config": str(file)}).engine.base_model == "ours"
    with pytest.raises(ConfigError):
        read_settings({"settings": str(tmp_path / "missing")})


def test_a_driver_that_cannot_be_made_stops_no_tick(sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = load_settings(rollout={"applications": {"driver": "rayservice"}})[0]
    made = applications(sqlite_database, settings)
    assert made is not None
    made.sync(now_us())
    assert made.status(NAME) == (
        "loading",
        "rollout.applications.api_url=None is needed outside a cluster; name the API server",
    )
    assert applications(sqlite_database, load_settings()[0]) is None
