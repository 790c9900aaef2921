"""What fails around a rollout: the registry, routers, files, other controllers, the database."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import UnavailableError
from serve.rollout import controller, steps
from serve.rollout.commands import freeze, start
from serve.rollout.report import describe as describe_rollout
from serve.rollout.report import line
from serve.rollout.store import get_rollout
from serve.routes import Route, RouteKey, write_route
from tests.serve.rollout_story import good, scripted
from tests.serve.rollout_world import TENANT, Killed, World, demo_settings
from tests.serve.test_rollout import ANN, population


@pytest.mark.parametrize("failure", [UnavailableError("MLflow does not answer"), KeyError("a defect")])
def test_a_registry_that_is_down_delays_a_promotion_but_loses_nothing(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    world = World(sqlite_database, demo_settings(), population())
    scripted(monkeypatch, lambda rollout: good(world))
    world.registry.failure = failure
    rollout_id = world.start().rollout_id
    assert world.run(rollout_id, seconds=40, traffic=False).state == "promoting"
    assert world.registry.aliases["champion"] == "triage/1"
    told = describe_rollout(get_rollout(sqlite_database, rollout_id))["failure"]
    assert str(failure) in str(told)
    world.registry.failure = None
    assert world.run(rollout_id, seconds=2, traffic=False).state == "promoted"
    assert world.registry.aliases["champion"] == "triage/2"


def test_a_rollout_that_fails_holds_up_no_other(sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(sqlite_database, demo_settings(), population())
    scripted(monkeypatch, lambda rollout: good(world))
    first = world.start().rollout_id
    other = RouteKey(TENANT, "triage", "voice")
    write_route(sqlite_database, other, {"stable": "triage/1"}, expected_revision=0, writer="person:ann")
    second = start(world.steps, world.settings, other, "triage/2", actor=ANN).rollout_id  # type: ignore[arg-type]
    smoke = world.routers.smoke

    def defect(route: Route, version: str) -> str | None:
        if route.modality == "text":
            raise RuntimeError("no such thing")
        return smoke(route, version)

    monkeypatch.setattr(world.routers, "smoke", defect)
    world.run_on(2, traffic=False)
    known = {name: get_rollout(sqlite_database, name) for name in (first, second)}
    assert (known[first].state, known[second].state) == ("pending", "running")
    assert "no such thing" in describe_rollout(known[first])["failure"] and "no such thing" in line(known[first])
    monkeypatch.undo()
    scripted(monkeypatch, lambda rollout: good(world))
    world.run_on(1, traffic=False)
    recovered = describe_rollout(get_rollout(sqlite_database, first))
    assert (recovered["state"], recovered["failure"]) == ("running", None)


def test_a_candidate_whose_files_are_gone_does_not_wait_for_ever(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(sqlite_database, demo_settings(start_timeout_s=5), population())

    def gone(version: str) -> None:
        raise UnavailableError("no adapter at s3://models/triage-2")

    monkeypatch.setattr(world.servables, "want", gone)
    rollout = world.run(world.start().rollout_id, seconds=8, traffic=False)
    assert rollout.state == "failed" and "no adapter at s3://models/triage-2" in str(rollout.reason)


def test_two_controllers_that_apply_one_decision_do_not_take_each_other_for_a_person(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read the route, and the other one writes it first."""
    world = World(sqlite_database, demo_settings(), population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    world.run_on(1, traffic=False)
    world.now_us += 10_000_000
    world.steps.kill_at = world.steps.point + 2  # decided, and nothing done yet
    with pytest.raises(Killed):
        world.controller().tick()
    real = steps.write_route
    raced: list[Route] = []

    def second(*arguments: Any, **named: Any) -> Route:
        if not raced:
            raced.append(real(*arguments, **named))
        return real(*arguments, **named)

    monkeypatch.setattr(steps, "write_route", second)
    assert not world.controller().tick()  # the dead one has the lease, and what it decided is applied all the same
    rollout = get_rollout(sqlite_database, rollout_id)
    assert raced and (rollout.state, rollout.stage, world.route.share) == ("running", 0, 0.1)


def test_routers_that_lag_are_waited_for_and_then_warned_of(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(sqlite_database, demo_settings(confirm_timeout_s=5), population())
    scripted(monkeypatch, lambda rollout: good(world))
    world.routers.shown = False
    rollout_id = world.start().rollout_id
    rollout = world.run(rollout_id, seconds=4, traffic=False)
    assert rollout.pending_decision is not None and world.route.share == 0.1
    assert world.run(rollout_id, seconds=4, traffic=False).state == "running"


def test_a_command_finishes_what_a_dead_controller_left_half_done(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(database, demo_settings(), population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    world.run(rollout_id, seconds=3, traffic=False)
    world.now_us += 10_000_000
    world.steps.kill_at = world.steps.point + 4  # the advance is recorded and on the route, but not settled
    with pytest.raises(Killed):
        world.controller().tick()
    assert get_rollout(database, rollout_id).stage == 0 and world.route.share == 0.25
    rollout = freeze(world.steps, rollout_id, ANN)  # type: ignore[arg-type]
    assert (rollout.state, rollout.stage, world.route.share) == ("holding", 1, 0.25)


def test_one_controller_at_a_time(database: Engine) -> None:
    world = World(database, demo_settings(lease_s=5), population())
    first, second = world.controller(), world.controller()
    assert first.tick() and not second.tick()
    world.now_us += 4_000_000
    assert first.tick() and not second.tick()
    world.now_us += 6_000_000
    assert second.tick() and not first.tick()
    second.close()
    assert first.tick()


def test_an_unreadable_database_is_a_hold(sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(sqlite_database, demo_settings(), population())
    rollout_id = world.start().rollout_id
    world.run(rollout_id, seconds=3)

    def fails(*arguments: Any, **named: Any) -> None:
        raise sa.exc.OperationalError("SELECT", {}, UnavailableError("gone"))  # type: ignore[arg-type]

    monkeypatch.setattr(controller, "read_evidence", fails)
    rollout = world.run(rollout_id, seconds=20)
    assert (rollout.state, rollout.progress["last_code"], world.route.share) == (
        "holding",
        "unavailable",
        0.1,
    )
