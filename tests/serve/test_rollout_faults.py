"""Whatever goes missing in the middle of a good rollout: it never grows, holds, and comes back at the limit."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.tables import rollouts
from serve.experiments.evidence import Evidence
from serve.experiments.store import get_experiment
from serve.rollout import controller
from serve.rollout.replay import verify_decisions
from serve.rollout.state import RolloutConfig
from serve.rollout.store import Rollout, get_rollout
from tests.serve.rollout_story import good, scripted
from tests.serve.rollout_world import Population, World, demo_settings
from tests.serve.test_decide import evidence, reading

HOLD_LIMIT_S = 10
Read = Callable[[World], Evidence | None]


def raising(error: Exception) -> Read:
    def read(world: World) -> Evidence | None:
        raise error

    return read


def seen_now(world: World, **values: Any) -> Evidence:
    return evidence(last_seen_us={"candidate": world.now_us, "stable": world.now_us}, **values)


FAULTS: dict[str, tuple[Read, str]] = {
    "timeout": (raising(sa.exc.TimeoutError("the statistics took too long")), "unavailable"),
    "unreadable": (raising(ValueError("a row that is no number")), "unavailable"),
    "none": (lambda world: None, "unavailable"),
    "empty": (lambda world: seen_now(world, primary=reading(users=0, problem="no data")), "too_few_users"),
    "guardrail without data": (
        lambda world: seen_now(world, guardrails=(reading("error_rate", 0.05, problem="no data"),)),
        "missing",
    ),
    "not a number": (lambda world: seen_now(world, primary=reading(z=math.nan)).finite(), "not_a_number"),
    "infinite": (lambda world: seen_now(world, guardrails=(reading(harm=-math.inf),)).finite(), "not_a_number"),
    "stale": (lambda world: evidence(last_seen_us={"candidate": 1, "stable": 1}), "stale"),
    "never seen": (lambda world: evidence(last_seen_us={}), "stale"),
}


def begun(engine: Engine, **settings: Any) -> tuple[World, Rollout]:
    world = World(engine, demo_settings(hold_limit_s=HOLD_LIMIT_S, **settings), Population(users=20))
    return world, world.start()


def shares(world: World) -> list[float]:
    return [d["share_after"] for d in world.decisions()]


def assert_came_back(world: World, rollout: Rollout, code: str, share: float) -> None:
    """It held for that reason, did not grow beyond `share`, and was rolled back at the limit."""
    ended = get_rollout(world.engine, rollout.rollout_id)
    assert (ended.state, world.route.stable, world.route.share) == ("rolled_back", "triage/1", 0.0)
    assert max(shares(world)) == share and world.registry.aliases["champion"] == "triage/1"
    codes = [d["evidence"]["decision"]["code"] for d in world.decisions()]
    assert codes[-2:] == [code, "held_too_long"]
    assert get_experiment(world.engine, rollout.experiment.experiment_id).outcome == "inconclusive"
    assert verify_decisions(world.engine).faults == []


@pytest.mark.parametrize("fault", FAULTS)
def test_evidence_that_fails_holds_and_comes_back_at_the_limit(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken, code = FAULTS[fault]
    world, rollout = begun(sqlite_database, stale_after_s=1)
    real = controller._evidence
    scripted(monkeypatch, lambda rollout: good(world))
    while world.route.share < 0.25:
        world.run_on(1, traffic=False)
    monkeypatch.setattr(controller, "read_evidence", lambda *_, **__: broken(world))
    monkeypatch.setattr(controller, "_evidence", real)
    world.run_on(8, traffic=False)
    held = get_rollout(sqlite_database, rollout.rollout_id)
    assert (held.state, world.route.share, held.progress["last_code"]) == ("holding", 0.25, code)
    world.run_on(HOLD_LIMIT_S, traffic=False)
    assert_came_back(world, rollout, code, 0.25)


@pytest.mark.parametrize(("primary", "code"), [("outcome:nobody_reports_it", "too_few_users"), ("gone", "unavailable")])
def test_a_metric_without_data_or_that_nobody_knows_any_more_is_no_success(
    sqlite_database: Engine, primary: str, code: str
) -> None:
    """The second as after an update that dropped a metric: settings refuse such a name, a running rollout has it."""
    world, rollout = begun(sqlite_database, stage_duration_s=1)
    changed = rollout.config | {"experiment": rollout.config["experiment"] | {"primary": "outcome:nobody_reports_it"}}
    known = RolloutConfig.model_validate(changed)
    named = known.model_copy(update={"experiment": known.experiment.model_copy(update={"primary": primary})})
    with sqlite_database.begin() as connection:
        connection.execute(rollouts.update().values(config=changed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "settings", property(lambda self: named))
        world.run_on(HOLD_LIMIT_S + 12)
    ended = get_rollout(sqlite_database, rollout.rollout_id)
    assert ended.state == "rolled_back" and max(shares(world)) == 0.1
    codes = [d["evidence"]["decision"]["code"] for d in world.decisions()]
    assert codes[-2:] == [code, "held_too_long"]


@contextmanager
def gone(engine: Engine) -> Iterator[None]:
    """The database answers nobody."""

    def refuse(*_: Any) -> None:
        raise sa.exc.OperationalError("…", {}, ConnectionError("the server closed the connection"))

    sa.event.listen(engine, "before_cursor_execute", refuse)
    try:
        yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", refuse)


@pytest.mark.parametrize(("seconds", "ending"), [(HOLD_LIMIT_S - 2, "promoted"), (100, "rolled_back")])
def test_without_the_database_nothing_moves_and_beyond_the_limit_the_rollout_comes_back(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch, seconds: int, ending: str
) -> None:
    world, rollout = begun(sqlite_database)
    scripted(monkeypatch, lambda rollout: good(world))
    while world.route.share < 0.25:
        world.run_on(1, traffic=False)
    acting = world.controller()
    with gone(sqlite_database):
        for _ in range(seconds):
            world.now_us += 1_000_000
            with contextlib.suppress(sa.exc.OperationalError):
                acting.tick()
    assert (world.route.share, get_rollout(sqlite_database, rollout.rollout_id).stage) == (0.25, 1)
    world.run_on(30, traffic=False)
    assert get_rollout(sqlite_database, rollout.rollout_id).state == ending
    assert verify_decisions(sqlite_database).faults == []


def test_good_evidence_without_a_router_is_no_promotion(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last router goes away after the last decision: nobody sees it, and at the limit it is taken back."""
    world, rollout = begun(sqlite_database, confirm_timeout_s=3)
    scripted(monkeypatch, lambda rollout: good(world))
    while get_rollout(sqlite_database, rollout.rollout_id).stage < 3:
        world.run_on(1, traffic=False)
    world.routers.shown = False
    world.run_on(8, traffic=False)
    waiting = get_rollout(sqlite_database, rollout.rollout_id)
    experiment = get_experiment(sqlite_database, rollout.experiment.experiment_id)
    assert (waiting.state, experiment.state) == ("promoting", "running")
    world.run_on(HOLD_LIMIT_S + 5, traffic=False)
    ended = get_rollout(sqlite_database, rollout.rollout_id)
    assert (ended.state, world.route.stable) == ("rolled_back", "triage/1")
    assert world.registry.aliases["champion"] == "triage/1" and not list(world.log.scan(kinds=["model.updated"]))[:-1]
    assert get_experiment(sqlite_database, rollout.experiment.experiment_id).outcome == "inconclusive"
    assert verify_decisions(sqlite_database).faults == []


def test_without_routers_there_is_no_start_and_later_no_growth(sqlite_database: Engine) -> None:
    """No router: the smoke test fails, nothing is read back, and nobody asks."""
    world, rollout = begun(sqlite_database, confirm_timeout_s=3)
    world.routers.broken = "connection refused"
    controller_ = world.controller()
    for _ in range(10):
        world.now_us += 1_000_000
        controller_.tick()
    controller_.close()
    ended = get_rollout(sqlite_database, rollout.rollout_id)
    assert ended.state == "failed" and "connection refused" in str(ended.reason) and max(shares(world)) == 0.0
    world.routers.broken = None
    rollout = world.start()
    world.run_on(2)
    assert world.route.share == 0.1
    world.routers.shown = False
    rollout = world.run(rollout.rollout_id, traffic=False, seconds=HOLD_LIMIT_S + 30)
    assert_came_back(world, rollout, "stale", 0.1)
