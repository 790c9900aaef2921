"""After a promotion the guardrails go on being watched, and a breach brings the previous champion back."""

from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError
from serve.experiments.store import get_experiment
from serve.rollout.commands import freeze, roll_back
from serve.rollout.replay import verify_decisions
from serve.rollout.store import Rollout
from serve.routes import update_route
from tests.serve.rollout_world import Population, World, demo_settings

ANN = "person:ann"


def population(**versions: float) -> Population:
    known = {f"triage/{name[1:]}": value for name, value in versions.items()}
    return Population(users=400, accuracy={"stable": 0.65, "candidate": 0.85, **known}, seed=5)


def promoted(database: Engine, people: Population, **settings: Any) -> tuple[World, Rollout]:
    """A world in which triage/2 has just become stable in place of triage/1."""
    world = World(database, demo_settings(**settings), people)
    world.registry.gates |= {"triage/3": "passed"}
    rollout = world.run(world.start().rollout_id)
    assert (rollout.state, world.route.stable) == ("promoted", "triage/2")
    return world, rollout


@pytest.mark.parametrize("warm_s", [3, 1000])
def test_a_guardrail_brings_the_previous_champion_back_by_itself(sqlite_database: Engine, warm_s: float) -> None:
    """Fine while it was tried, bad from its promotion on. Unloaded or still warm, the old champion returns."""
    people = population()
    world = World(sqlite_database, demo_settings(warm_s=warm_s), people)
    rollout = world.run(world.start().rollout_id)
    assert rollout.state == "promoted" and world.route.stable == "triage/2"
    world.run_on(5)
    assert (world.state(rollout), world.route.stable) == ("promoted", "triage/2")
    assert ("triage/1" in world.servables.wanted) == (warm_s > 5)
    people.accuracy["stable"] = 0.05  # what the route calls stable is now the promoted candidate
    world.run_on(20)
    assert (world.state(rollout), world.route.stable, world.route.experiment_id) == ("rolled_back", "triage/1", None)
    assert world.registry.aliases["champion"] == "triage/1"
    assert get_experiment(sqlite_database, rollout.experiment.experiment_id).outcome == "rejected_by_guardrail"
    last = world.decisions()[-1]
    assert "after its promotion" in last["reason"] and last["evidence"]["evidence"]["period"] == "1"
    assert "worse" in world.registry.tags["triage/2", "rayloop.rolled_back"]
    assert verify_decisions(sqlite_database).faults == []


def test_nothing_is_brought_back_after_the_window(sqlite_database: Engine) -> None:
    people = population()
    world = World(sqlite_database, demo_settings(restore_window_s=8), people)
    rollout = world.run(world.start().rollout_id)
    world.run_on(9)
    people.accuracy["stable"] = 0.2
    world.run_on(15)
    assert (world.state(rollout), world.route.stable) == ("promoted", "triage/2")
    with pytest.raises(ConflictError, match="start a rollout of the old version"):
        roll_back(world.steps, rollout.rollout_id, ANN, "too late")  # type: ignore[arg-type]


def test_the_watch_goes_on_while_the_next_candidate_is_on_trial(sqlite_database: Engine) -> None:
    """What the next candidate was compared with turns out bad: the champion before it returns, and the trial ends."""
    people = population(v3=0.85)
    world, rollout = promoted(sqlite_database, people)
    following = world.start("triage/3")
    world.run_on(3)
    assert world.route.candidate == "triage/3"
    freeze(world.steps, following.rollout_id, ANN)  # type: ignore[arg-type]
    people.accuracy["triage/2"] = 0.05
    world.run_on(25)
    assert (world.state(rollout), world.state(following)) == ("rolled_back", "rolled_back")
    assert (world.route.stable, world.route.arms, world.registry.aliases["champion"]) == ("triage/1", (), "triage/1")
    reasons = {d["rollout_id"]: d["reason"] for d in world.decisions() if d["outcome"] == "rollback"}
    assert "after its promotion satisfaction is worse" in reasons[rollout.rollout_id]
    assert reasons[following.rollout_id] == "triage/1 was made stable meanwhile"
    assert verify_decisions(sqlite_database).faults == []


def test_the_watch_rests_while_another_version_is_stable_and_goes_on_when_it_returns(sqlite_database: Engine) -> None:
    people = population()
    world, rollout = promoted(sqlite_database, people)
    update_route(sqlite_database, world.key, {"stable": "triage/3"}, writer="person:bob")
    people.accuracy["triage/2"] = people.accuracy["triage/3"] = 0.05
    world.run_on(15)
    assert (world.state(rollout), world.route.stable) == ("promoted", "triage/3")
    said = [d["reason"] for d in world.decisions() if d["evidence"]["decision"]["code"] == "replaced"]
    assert said == ["promoted; triage/3 is stable by now, and the watch rests until this version is again"]
    with pytest.raises(ConflictError, match="triage/2 is not stable any more, triage/3 is"):
        roll_back(world.steps, rollout.rollout_id, ANN, "too late")  # type: ignore[arg-type]
    assert world.registry.aliases["champion"] == "triage/2"
    people.accuracy["triage/2"] = 0.85
    update_route(sqlite_database, world.key, {"stable": "triage/2"}, writer="person:bob")
    world.run_on(3)
    people.accuracy["triage/2"] = 0.05
    world.run_on(25)
    assert (world.state(rollout), world.route.stable) == ("rolled_back", "triage/1")
    codes = [d["evidence"]["decision"]["code"] for d in world.decisions()]
    assert codes[-3:] == ["replaced", "watching", "guardrail"]
    assert verify_decisions(sqlite_database).faults == []


def test_each_champion_gives_way_to_the_one_before_it(sqlite_database: Engine) -> None:
    """triage/3 replaces triage/2, turns bad and goes; triage/2, watched again, turns bad too: triage/1 is left."""
    people = population(v3=0.97)
    world, rollout = promoted(sqlite_database, people)
    following = world.run(world.start("triage/3").rollout_id)
    assert (following.state, world.route.stable) == ("promoted", "triage/3")
    people.accuracy["triage/3"] = 0.05
    world.run_on(20)
    assert (world.state(following), world.state(rollout), world.route.stable) == ("rolled_back", "promoted", "triage/2")
    people.accuracy["triage/2"] = 0.05
    world.run_on(60)  # what it did well before counts too
    assert (world.state(rollout), world.route.stable) == ("rolled_back", "triage/1")
    assert world.registry.aliases["champion"] == "triage/1"
