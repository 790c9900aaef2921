"""What router replicas say they serve, and what follows from it for a rollout."""

import pytest
from sqlalchemy.engine import Engine

from cluster.settings import load_settings
from serve import replicas
from serve.replicas import ReplicaReport, is_served
from serve.routes import Route, RouteKey, read_route, update_route
from serve.snapshot import Watcher

KEY = RouteKey("default", "triage")
ALIVE_S = 10.0


def at(revision: int) -> Route:
    return Route("default", "triage", "text", "triage/1", revision=revision)


def test_a_revision_is_served_once_every_live_replica_says_so(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_us = 1_000_000_000
    monkeypatch.setattr(replicas, "now_us", lambda: now_us)
    one, other = ReplicaReport("one", ALIVE_S), ReplicaReport("other", ALIVE_S)
    assert not is_served(database, at(1), ALIVE_S)  # nobody is there
    one.tell(database, {KEY: at(2)})
    other.tell(database, {KEY: at(1)})
    assert is_served(database, at(1), ALIVE_S) and not is_served(database, at(2), ALIVE_S)
    other.tell(database, {KEY: at(2)})
    assert is_served(database, at(2), ALIVE_S)
    assert not is_served(database, Route("default", "sales", "text", "sales/1", revision=1), ALIVE_S)
    one.leave(database)
    assert is_served(database, at(2), ALIVE_S)
    now_us += 11_000_000  # the other one died without a word
    assert not is_served(database, at(2), ALIVE_S)
    one.tell(database, {KEY: at(3)})
    assert is_served(database, at(3), ALIVE_S)


def test_a_replica_repeats_itself_before_it_would_count_as_gone(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_us = 1_000_000_000
    monkeypatch.setattr(replicas, "now_us", lambda: now_us)
    one = ReplicaReport("one", ALIVE_S)
    for _ in range(30):
        one.tell(database, {KEY: at(1)})
        now_us += 1_000_000
        assert is_served(database, at(1), ALIVE_S)


def test_a_router_says_what_it_serves_and_takes_leave(sqlite_database: Engine) -> None:
    update_route(sqlite_database, KEY, {"stable": "triage/1"}, writer="person:x")
    watcher = Watcher(load_settings(database={"url": str(sqlite_database.url)})[0])
    watcher.refresh()
    assert is_served(sqlite_database, read_route(sqlite_database, KEY), ALIVE_S)
    update_route(sqlite_database, KEY, {"stable": "triage/2"}, writer="person:x")
    assert not is_served(sqlite_database, read_route(sqlite_database, KEY), ALIVE_S)
    watcher.start()
    while not is_served(sqlite_database, read_route(sqlite_database, KEY), ALIVE_S):
        watcher.join(0.01)
    watcher.stop()
    assert not is_served(sqlite_database, read_route(sqlite_database, KEY), ALIVE_S)
    watcher.close()
