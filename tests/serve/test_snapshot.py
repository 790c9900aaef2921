"""What a router knows, and what it keeps when the database is gone."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine as Database

from cluster.database import write
from cluster.settings import Settings, load_settings
from cluster.tables import servable_replicas
from data.log import EventLog
from serve import snapshot
from serve.arms import plan
from serve.keys import create_key
from serve.openai import ApiError
from serve.routes import RouteKey, read_route, update_route
from serve.snapshot import Snapshot, Target, Watcher
from tests.serve.conftest import serve_version

KEY = RouteKey("default", "triage")


@pytest.fixture
def watcher(settings: Settings, sqlite_database: Database) -> Watcher:
    serve_version(sqlite_database, "triage/1", "base")
    update_route(sqlite_database, KEY, {"stable": "triage/1", "candidate": "triage/2", "share": 0.5}, writer="person:x")
    made = Watcher(settings)
    made.refresh()
    return made


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("the database is gone")


def test_snapshot_holds_routes_targets_and_keys(watcher: Watcher, sqlite_database: Database) -> None:
    secret = create_key(sqlite_database, "ann", "default", "default")
    watcher.refresh()
    current = watcher.current
    assert current.routes[KEY].share == 0.5
    assert current.targets["triage/1"] == Target("triage/1", "local", "base", "ab" * 32)
    assert current.keys.find(secret) is not None
    watcher.close()


def test_last_revision_stays_while_the_database_is_gone(watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    before = watcher.current
    monkeypatch.setattr(snapshot, "read_snapshot", unreachable)
    watcher.refresh()
    assert watcher.current == before
    watcher.close()


def test_ceiling_of_zero_stops_a_canary_without_a_database(watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "apply_config", unreachable)
    watcher.configure({"routes": [{"agent": "triage", "max_share": 0.0}]})
    watcher.refresh()
    assert watcher.current.routes[KEY].live_share == 0.0
    monkeypatch.undo()
    watcher.refresh()
    watcher.refresh()
    assert watcher.current.routes[KEY].max_share == 0.0
    watcher.close()


def test_config_that_waited_is_applied_when_the_database_returns(
    watcher: Watcher, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "apply_config", unreachable)
    watcher.configure({"routes": [{"agent": "triage", "share": 0.25}]})
    watcher.refresh()
    assert read_route(sqlite_database, KEY).share == 0.5
    monkeypatch.undo()
    watcher.refresh()
    assert read_route(sqlite_database, KEY).share == 0.25
    watcher.close()


def test_tenants_with_an_agent_of_one_name_see_their_own_versions(watcher: Watcher, sqlite_database: Database) -> None:
    serve_version(sqlite_database, "triage/2", "red")
    serve_version(sqlite_database, "triage/3", "blue", tenant="other")
    serve_version(sqlite_database, "triage/4", "base", tenant=None)  # a base model, which is nobody's
    update_route(sqlite_database, RouteKey("other", "triage"), {"stable": "triage/3"}, writer="person:x")
    watcher.refresh()
    assert watcher.current.known_models("default") == ["triage", "triage/1", "triage/2", "triage/4"]
    assert watcher.current.known_models("other") == ["triage", "triage/3", "triage/4"]
    assert watcher.current.known_models("third") == []
    with pytest.raises(ApiError, match="triage/2"):
        plan(watcher.current, "other", "triage/2", modality="text", user="u", session=None, request="r")
    lent = {"stable": "triage/2"}  # by whoever may write routes
    update_route(sqlite_database, RouteKey("other", "triage"), lent, writer="person:x")
    watcher.refresh()
    assert "triage/2" in watcher.current.known_models("other")
    watcher.close()


@pytest.mark.parametrize(
    "document",
    [{"routes": [{"agent": "triage", "share": 7}]}, {"rots": []}, "nonsense", [1], {"routes": None}],
)
def test_bad_config_never_raises_and_is_published_once(
    watcher: Watcher, sqlite_database: Database, document: Any
) -> None:
    other = Watcher(watcher._settings)
    for each in (watcher, other):
        each.configure(document)
        each.refresh()
        each.close()
    assert watcher.rejection is not None
    assert watcher.current.routes[KEY].share == 0.5
    events = EventLog(sqlite_database).read(kinds=["config.rejected"])
    assert len({e.event.body["reason"] for e in events}) == 1
    assert len(events) <= 2  # two, when the minute changed in between


def test_good_config_clears_the_rejection(watcher: Watcher) -> None:
    watcher.configure({"routes": [{"agent": "triage", "share": 7}]})
    watcher.configure({"routes": [{"agent": "triage", "share": 0.7}]})
    watcher.refresh()
    assert watcher.rejection is None
    watcher.close()


def want_only(database: Database, version: str, state: str | None = None, reason: str | None = None) -> None:
    """A version that an engine is asked for, and what its only replica says of it."""
    serve_version(database, version, version.replace("/", "-"))
    mine = servable_replicas.c.version == version
    with write(database).begin() as connection:
        if state is None:
            connection.execute(servable_replicas.delete().where(mine))
        else:
            connection.execute(servable_replicas.update().where(mine).values(state=state, reason=reason))


@pytest.mark.parametrize("route", [{"stable": "triage/3"}, {"candidate": "triage/3", "share": 0.1}])
def test_config_waits_until_the_version_it_sends_users_to_is_ready(
    watcher: Watcher, sqlite_database: Database, route: dict[str, Any]
) -> None:
    want_only(sqlite_database, "triage/3", "loading")
    watcher.configure({"routes": [{"agent": "triage"} | route]})
    for _ in range(3):
        watcher.refresh()
    assert "triage/3 may not answer" in str(watcher.rejection)
    assert read_route(sqlite_database, KEY).revision == 1
    assert len(EventLog(sqlite_database).read(kinds=["config.rejected"])) == 1
    with write(sqlite_database).begin() as connection:
        connection.execute(servable_replicas.update().values(state="idle"))
    watcher.refresh()
    assert watcher.rejection is None
    assert "triage/3" in read_route(sqlite_database, KEY).versions
    watcher.close()


def test_config_may_not_name_a_version_that_failed_its_checks_as_stable(
    watcher: Watcher, sqlite_database: Database
) -> None:
    want_only(sqlite_database, "triage/3", "failed", "its digest is wrong")
    watcher.configure({"routes": [{"agent": "triage", "stable": "triage/3"}]})
    watcher.refresh()
    assert "an engine refused it: its digest is wrong" in str(watcher.rejection)
    assert read_route(sqlite_database, KEY).stable == "triage/1"
    watcher.configure({"routes": [{"agent": "triage", "candidate": "triage/3", "share": 0.0}]})  # nobody gets it
    watcher.refresh()
    assert watcher.rejection is None
    watcher.close()


def test_router_that_starts_after_a_bad_config_has_the_engines_of_the_last_good_one(
    watcher: Watcher, sqlite_database: Database
) -> None:
    elsewhere = {"base_url": "https://api.example.com", "models": {"triage/7": "seven"}}
    watcher.configure({"engines": {"hosted": elsewhere}, "routes": [{"agent": "triage", "max_share": 0.2}]})
    watcher.refresh()
    late = Watcher(watcher._settings)
    late.configure({"rots": []})
    late.refresh()
    assert late.endpoints == watcher.endpoints
    assert late.current.targets["triage/7"] == Target("triage/7", "hosted", "seven")
    assert "rots" in str(late.rejection)
    for each in (watcher, late):
        each.close()


def test_database_that_never_answered_leaves_nothing_read(tmp_path: Path) -> None:
    settings, _ = load_settings(home=tmp_path, database={"url": "postgresql://nobody@127.0.0.1:9/x"})
    watcher = Watcher(settings)
    watcher.refresh()
    assert watcher.current.read_at == 0.0


def arms(current: Snapshot, users: list[str]) -> dict[str, str]:
    return {
        u: plan(current, "default", "triage", modality="text", user=u, session=None, request="r").arm for u in users
    }


def test_ten_thousand_users_keep_their_arm_across_restarts_and_stages(
    settings: Settings, sqlite_database: Database
) -> None:
    users = [f"user-{n}" for n in range(10_000)]
    update_route(sqlite_database, KEY, {"stable": "triage/1", "candidate": "triage/2"}, writer="person:x")
    exposed: set[str] = set()
    for share in (0.10, 0.25, 0.50, 1.0):
        update_route(sqlite_database, KEY, {"share": share}, writer="controller")
        seen = []
        for _ in range(2):  # two replicas, or one before and after a restart
            watcher = Watcher(settings)
            watcher.refresh()
            seen.append(arms(watcher.current, users))
            watcher.close()
        assert seen[0] == seen[1]
        candidates = {user for user, arm in seen[0].items() if arm == "candidate"}
        assert exposed <= candidates
        assert abs(len(candidates) / len(users) - share) < 0.02
        exposed = candidates
    update_route(sqlite_database, KEY, {"share": 0.0}, writer="controller")
    watcher = Watcher(settings)
    watcher.refresh()
    assert set(arms(watcher.current, users).values()) == {"stable"}
    watcher.close()


def test_unit_falls_back_from_user_to_session_to_request() -> None:
    from serve.routes import Route
    from serve.split import Arm

    route = Route("default", "triage", "text", "triage/1", (Arm(0.0, 0.5, "triage/2"),), salt="s", revision=1)
    current = Snapshot({KEY: route}, {}, read_at=1.0)
    given: list[dict[str, str | None]] = [
        {"user": "u", "session": "s"},
        {"user": None, "session": "s"},
        {"user": None, "session": None},
    ]
    units = [plan(current, "default", "triage", modality="text", request="r", **each).unit for each in given]
    assert units == ["user", "session", "request"]
