"""A/B/n: several candidates against one stable, each a rollout of its own in one layer."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.tables import experiments, rollouts
from serve.experiments.exposures import RAMP
from serve.experiments.logged import read_logged
from serve.experiments.projection import Projection
from serve.experiments.readings import read_evidence, read_moments
from serve.rollout.commands import approve, roll_back
from serve.rollout.replay import verify_decisions
from serve.rollout.store import Rollout, get_rollout
from tests.serve.rollout_world import Population, World, demo_settings

SHARES = {"triage/2": 0.3, "triage/3": 0.3}


def world_of(database: Engine, **accuracy: float) -> World:
    known = {f"triage/{name[1:]}": value for name, value in accuracy.items()}
    people = Population(users=600, accuracy={"stable": 0.6, "candidate": 0.6, **known}, seed=4)
    stages = {"stages": (0.5, 1.0), "checks": ("significant_improvement", "final_validation")}
    world = World(database, demo_settings(**stages), people)
    world.registry.gates |= {"triage/3": "passed", "triage/4": "passed"}
    return world


def now(world: World, rollout: Rollout) -> Rollout:
    return get_rollout(world.engine, rollout.rollout_id)


def step(world: World, seconds: int, until: Any = lambda: False) -> None:
    """Seconds of traffic with a tick after each, at most until the condition holds."""
    controller = world.controller()
    for _ in range(seconds):
        world.second(120)
        controller.tick()
        if until():
            break
    controller.close()


@pytest.mark.parametrize(
    ("shares", "error", "said"),
    [
        ({"triage/2": 0.3}, InputError, "must name two candidates or more"),
        ({"triage/2": 0.6, "triage/3": 0.6}, InputError, r"shares\.triage/1=-0\.2 must be between 0 and 1"),
        ({"triage/1": 0.5, "triage/2": 0.3, "triage/3": 0.3}, InputError, r"must sum to 1, not 1\.1"),
        ({"triage/2": 0.4, "triage/3": 0.3}, InputError, r"shares\.triage/2=0\.4 must be above 0 and at most stable's"),
        ({"triage/2": 0.0, "triage/3": 0.3}, InputError, "must be above 0"),
        ({"triage/2": float("nan"), "triage/3": 0.3}, InputError, "must be between 0 and 1"),
        ({"triage/2": 0.3, "triage/9": 0.3}, NotFoundError, "no version 'triage/9'"),
        ({"triage/2": 0.3, "triage/5": 0.3}, ConflictError, "triage/5 has gates failed"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_anything_starts(
    sqlite_database: Engine, shares: dict[str, float], error: type[Exception], said: str
) -> None:
    world = world_of(sqlite_database)
    world.registry.gates["triage/5"] = "failed"
    with pytest.raises(error, match=said):
        world.compare(shares)
    with sqlite_database.connect() as connection:
        counts = [
            connection.execute(sa.select(sa.func.count()).select_from(t)).scalar() for t in (experiments, rollouts)
        ]
    assert counts == [0, 0]


def test_nobody_else_may_claim_buckets_of_a_comparison(database: Engine) -> None:
    world = world_of(database)
    first, second = world.compare(SHARES)
    low, high = first.experiment.bucket_high, second.experiment.bucket_low
    assert low == high == 0.3 and first.experiment.salt == second.experiment.salt
    for layer in (None, "another"):
        with pytest.raises(ConflictError, match=f"experiment {first.experiment.experiment_id} runs on route triage"):
            world.start("triage/4", layer=layer)


def test_each_candidate_is_judged_against_its_control_with_its_part_of_alpha(database: Engine) -> None:
    world = world_of(database)
    made = world.compare(SHARES)
    step(world, 12)
    route = world.route
    assert [(arm.version, arm.start) for arm in route.arms] == [("triage/2", 0.0), ("triage/3", 0.3)]
    Projection(database, world.settings).catch_up()
    for rollout in made:
        config = rollout.settings
        assert config.experiment.alpha == world.settings.experiment.alpha / 2
        assert config.experiment.srm_alpha == world.settings.experiment.srm_alpha / 2
        own = rollout.experiment.experiment_id
        evidence = read_evidence(database, own, config.experiment, period=RAMP)
        split = evidence.split
        assert sum(split.users.values()) == pytest.approx(sum(split.expected.values())) and split.p_value > 0.01
        assert min(evidence.exposed.values()) > 10
        sums = read_moments(database, own, period=RAMP)["error_rate"]
        assert set(sums) == {"candidate", "control"}
        logged = read_logged(database, own)
        assert 0.1 < logged.candidate_N.mean() < 0.3 and logged.propensity_N.min() > 0.1
    with database.connect() as connection:
        users = sa.text("select count(*) from experiment_users where excluded")
        assert connection.execute(users).scalar() == 0


def test_a_bad_candidate_leaves_and_the_other_goes_on_to_a_persons_approval(sqlite_database: Engine) -> None:
    world = world_of(sqlite_database, v2=0.15, v3=0.95)
    bad, good = world.compare(SHARES)
    step(world, 60, lambda: now(world, bad).state == "rolled_back")
    assert (now(world, bad).state, now(world, bad).experiment.outcome) == ("rolled_back", "rejected_by_guardrail")
    assert [arm.version for arm in world.route.arms] == ["triage/3"] and now(world, good).state in (
        "running",
        "holding",
    )
    assert "worse" in world.registry.tags["triage/2", "rayloop.rolled_back"]
    step(world, 120, lambda: now(world, good).state == "awaiting_approval" and now(world, good).stage == 1)
    assert (now(world, good).state, world.route.stable) == ("awaiting_approval", "triage/1")
    approve(world.steps, good.rollout_id, "person:ann")  # type: ignore[arg-type]
    step(world, 20, lambda: now(world, good).state == "promoted")
    route = world.route
    assert (route.stable, route.arms, world.registry.aliases["champion"]) == ("triage/3", (), "triage/3")
    assert verify_decisions(sqlite_database).faults == []


def test_the_others_leave_when_one_is_promoted(sqlite_database: Engine) -> None:
    world = world_of(sqlite_database, v2=0.9, v3=0.9)
    first, second = world.compare(SHARES)
    waiting = lambda: {now(world, r).state for r in (first, second)} == {"awaiting_approval"}  # noqa: E731
    step(world, 150, waiting)
    assert waiting()
    approve(world.steps, second.rollout_id, "person:ann")  # type: ignore[arg-type]
    step(world, 20, lambda: now(world, first).state == "rolled_back")
    assert (now(world, second).state, now(world, first).experiment.outcome) == ("promoted", "keep")
    assert "triage/3 was made stable" in str(now(world, first).reason)
    assert (world.route.stable, world.route.arms) == ("triage/3", ())
    assert "triage/2" not in world.servables.wanted
    assert verify_decisions(sqlite_database).faults == []


def test_a_rollback_by_hand_takes_one_candidate_off_and_its_users_count_for_nobody(sqlite_database: Engine) -> None:
    world = world_of(sqlite_database)
    first, second = world.compare(SHARES)
    step(world, 8)
    roll_back(world.steps, first.rollout_id, "person:ann", "enough")  # type: ignore[arg-type]
    step(world, 8)
    [arm] = world.route.arms
    assert (arm.version, arm.start, world.route.salt) == ("triage/3", 0.3, second.experiment.salt)
    assert now(world, second).state in ("running", "holding") and not now(world, second).progress.get("edited_by")
    query = sa.text("select count(*) from experiment_users where excluded and experiment_id = :own")
    with sqlite_database.connect() as connection:
        moved = connection.execute(query, {"own": second.experiment.experiment_id}).scalar()
    assert moved and moved > 0  # they saw the other candidate, so they are no control
