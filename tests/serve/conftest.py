"""A router on a real port before a scripted engine, with one route and one key."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import ColumnElement
from sqlalchemy.engine import Engine as Database

from cluster.clock import now_us
from cluster.database import connect, write
from cluster.settings import Settings, load_settings
from cluster.tables import servable_replicas, servables
from data.events import RecordedEvent
from data.log import EventLog
from serve.keys import create_key
from serve.prompts import PromptPolicy
from serve.router import RouterApp
from serve.routes import RouteKey, update_route
from serve.servables import PRESENCE
from tests.databases import place_database
from tests.serve.upstream import Engine, Server

KEY = RouteKey("default", "triage")
LEARNING: dict[str, Any] = {
    "learning": {"enabled": True},
    "capture": {"enabled": True},
    "feedback": {"explicit": True, "implicit": True},
    "trajectory_evaluation": {"enabled": True},
}


def serve_version(
    database: Database, version: str, model_name: str, engine: str = "local", tenant: str | None = "default"
) -> None:
    """A version that its engine holds, as far as the tables say."""
    row = {
        "tenant": tenant, "version": version, "engine": engine, "model_name": model_name, "base_model": "base",
        "adapter_sha256": "ab" * 32, "prompt_digest": "", "wanted": True, "updated_at_us": now_us(),
    }  # fmt: skip
    report = {"engine": engine, "replica_id": "test", "state": "idle", "heartbeat_us": now_us()}  # for good
    with write(database).begin() as connection:
        connection.execute(servables.insert().values(**row))
        connection.execute(servable_replicas.delete().where(_presence_of(engine)))
        connection.execute(servable_replicas.insert(), [report | {"version": v} for v in (version, PRESENCE)])


def _presence_of(engine: str) -> ColumnElement[bool]:
    return (servable_replicas.c.version == PRESENCE) & (servable_replicas.c.engine == engine)


@dataclass
class Live:
    """A running router and what stands behind it."""

    url: str
    secret: str
    engine: Engine
    engine_url: str
    database: Database
    settings: Settings
    app: RouterApp
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, secret: str | None = None, **options: Any) -> openai.OpenAI:
        made = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=secret or self.secret, max_retries=0, timeout=20, **options
        )
        self.clients.append(made)
        return made

    def route(self, **change: Any) -> None:
        update_route(self.database, KEY, change, writer="person:test")
        self.app.watcher.refresh()

    def events(self, kind: str, count: int, within_s: float = 30.0) -> list[RecordedEvent]:
        """The first events of a kind, waited for."""
        deadline = time.monotonic() + within_s
        while len(found := EventLog(self.database).read(kinds=[kind])) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} events of kind {kind}"
            time.sleep(0.02)
        return found


def live_router(home: Path, *, policy: PromptPolicy | None = None, **overrides: Any) -> Iterator[Live]:
    settings, _ = load_settings(home=home, **(LEARNING | overrides))
    place_database(settings)
    database = connect(settings)
    secret = create_key(database, "test", "default", "default", ["chat", "feedback", "label"])
    serve_version(database, "triage/1", "base")
    serve_version(database, "triage/2", "triage-2-abababababab")
    update_route(database, KEY, {"stable": "triage/1"}, writer="person:test")
    engine = Engine()
    with Server(engine) as engine_url:
        app = RouterApp(settings, default_engine_url=engine_url, policy=policy)
        app.watcher.refresh()
        with Server(app, lifespan="on") as url:
            running = Live(url, secret, engine, engine_url, database, settings, app)
            yield running
            for client in running.clients:
                client.close()
    database.dispose()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home")
