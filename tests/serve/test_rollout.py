"""Whole rollouts on a real database: simulated users, a simulated clock, everything else as in production."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.registry import NEEDS_RETRAINING_TAG
from cluster.tables import experiments, rollouts
from serve.experiments.projection import Projection
from serve.experiments.report import describe, to_text
from serve.experiments.store import check_shares, get_experiment
from serve.rollout import controller
from serve.rollout.commands import approve, freeze, roll_back, unfreeze
from serve.rollout.replay import replay
from serve.rollout.state import Decision
from serve.routes import update_route
from tests.serve.rollout_story import good, scripted
from tests.serve.rollout_world import Population, World, demo_settings

ANN = "person:ann"


def population(candidate: float = 0.85, **values: Any) -> Population:
    return Population(users=400, accuracy={"stable": 0.65, "candidate": candidate}, seed=5, **values)


def test_a_better_candidate_passes_every_stage_and_is_promoted(database: Engine) -> None:
    world = World(database, demo_settings(), population())
    rollout = world.run(world.start().rollout_id)
    assert (rollout.state, rollout.stage) == ("promoted", 3)
    route = world.route
    assert (route.stable, route.candidate, route.share) == ("triage/2", None, 0.0)
    assert world.registry.aliases["champion"] == "triage/2"
    assert world.servables.wanted == {"triage/1", "triage/2"}
    ended = get_experiment(database, rollout.experiment.experiment_id)
    assert (ended.state, ended.outcome) == ("ended", "promote")
    moves = [d for d in world.decisions() if d["outcome"] in ("start", "advance", "promote")]
    assert [d["share_after"] for d in moves] == [0.1, 0.25, 0.5, 0.9, 0.0]
    assert [d["number"] for d in world.decisions()] == list(range(1, rollout.decisions + 1))
    updated = [r.event.body for r in world.log.scan(kinds=["model.updated"])]
    assert [(u["version"], u["change"], u["alias"]) for u in updated] == [("triage/2", "alias", "champion")]


def test_a_version_trained_behind_another_prompt_starts_no_rollout(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    world.registry.tag("triage/2", "prompt_digest", "0" * 64)
    with pytest.raises(ConflictError, match="trained with the prompt 000000000000, the agent has no prompt"):
        world.start()
    assert world.start(override_reason="the prompt is only worded anew").state == "pending"


def test_every_recorded_decision_can_be_replayed(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    world.run(world.start().rollout_id)
    decided = [d["evidence"] for d in world.decisions() if "state" in d["evidence"]]
    assert len(decided) >= 4
    for record in decided:
        assert replay(record) == Decision.from_json(record["decision"])


def test_a_damaged_candidate_is_rolled_back_by_a_guardrail(database: Engine) -> None:
    world = World(database, demo_settings(), population(candidate=0.1))
    started_us = world.now_us
    rollout = world.run(world.start().rollout_id)
    assert rollout.state == "rolled_back"
    assert world.decisions()[-1]["evidence"]["decision"]["code"] == "guardrail"
    assert (world.now_us - started_us) / 1e6 < 30
    assert (world.route.stable, world.route.candidate, world.route.share) == ("triage/1", None, 0.0)
    assert world.registry.aliases["champion"] == "triage/1"
    assert "worse" in world.registry.tags["triage/2", "rayloop.rolled_back"]
    assert world.servables.wanted == {"triage/1"}
    ended = get_experiment(database, rollout.experiment.experiment_id)
    assert ended.outcome == "rejected_by_guardrail"


def test_a_failing_candidate_is_stopped_within_its_first_requests(sqlite_database: Engine) -> None:
    failing = population(error_rate={"stable": 0.0, "candidate": 0.8})
    world = World(sqlite_database, demo_settings(), failing)
    rollout = world.run(world.start().rollout_id, requests=20)
    assert rollout.state == "rolled_back"
    assert world.decisions()[-1]["evidence"]["decision"]["code"] == "first_requests"


def test_without_traffic_it_holds_and_then_rolls_back(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(hold_limit_s=30), population())
    rollout = world.run(world.start().rollout_id, traffic=False)
    assert rollout.state == "rolled_back"
    assert get_experiment(sqlite_database, rollout.experiment.experiment_id).outcome == "inconclusive"
    codes = [d["evidence"]["decision"]["code"] for d in world.decisions()]
    assert codes == ["started", "too_few_users", "stale", "held_too_long"]


def test_a_rebuild_of_the_statistics_changes_no_evidence(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    rollout = world.run(world.start().rollout_id, seconds=15)
    before = controller._evidence(sqlite_database, rollout)
    Projection(sqlite_database, world.settings).rebuild()
    assert controller._evidence(sqlite_database, rollout) == before


def test_a_candidate_that_silences_its_critics_is_not_promoted_without_that_being_said(
    sqlite_database: Engine,
) -> None:
    """No better at all, but its unhappy users say nothing: thumbs rise, reactions fall."""
    silencing = population(candidate=0.65, silences={"candidate": 0.8})
    world = World(sqlite_database, demo_settings(), silencing)
    rollout = world.run(world.start().rollout_id)
    onwards = [d for d in world.decisions() if d["outcome"] in ("advance", "promote")]
    assert rollout.state == "promoted" and len(onwards) == 4
    for decision in onwards[1:]:
        assert "the candidate's users react less often" in decision["reason"]
        assert decision["evidence"]["decision"]["details"]["caveats"]
    shown = describe(sqlite_database, rollout.experiment.experiment_id, world.settings)
    assert "react less often" in to_text(shown)


def test_with_its_guardrail_a_fall_of_the_response_rate_is_no_promotion(sqlite_database: Engine) -> None:
    settings = demo_settings()
    guarded = settings.experiment.model_copy(
        update={"guardrails": (*settings.experiment.guardrails, "feedback_response_rate")}
    )
    silencing = population(candidate=0.65, silences={"candidate": 0.8})
    world = World(sqlite_database, settings.model_copy(update={"experiment": guarded}), silencing)
    rollout = world.run(world.start().rollout_id)
    assert rollout.state != "promoted"
    assert any("feedback_response_rate" in d["reason"] for d in world.decisions())


# Starting


def test_gates_must_be_passed_or_overridden_with_a_reason(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    with pytest.raises(ConflictError, match="triage/3 has gates failed; run `rayloop evaluate"):
        world.start("triage/3")
    rollout = world.start("triage/3", override_reason="damaged on purpose")
    world.run(rollout.rollout_id, seconds=2)
    assert "overridden: damaged on purpose" in world.decisions()[0]["reason"]
    assert world.decisions()[0]["evidence"]["config"]["gates_override"] == "damaged on purpose"


def test_a_version_that_needs_retraining_is_not_started_whatever_the_reason(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    world.registry.tag("triage/2", NEEDS_RETRAINING_TAG, "{}")
    with pytest.raises(ConflictError, match="triage/2 needs retraining"):
        world.start("triage/2", override_reason="we want it")


def test_a_candidate_that_comes_to_need_retraining_is_taken_back_before_it_grows(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    rollout = world.start()
    world.run(rollout.rollout_id, seconds=3)
    assert world.route.share == 0.1
    world.registry.tag("triage/2", NEEDS_RETRAINING_TAG, "{}")
    ended = world.run(rollout.rollout_id)
    assert (ended.state, world.route.candidate) == ("rolled_back", None)
    assert "training data was erased" in world.decisions()[-1]["reason"]
    assert max(d["share_after"] for d in world.decisions()) == 0.1
    assert world.registry.aliases["champion"] == "triage/1"


def test_a_start_is_refused_before_anything_is_written(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    with pytest.raises(NotFoundError, match="triage/1, triage/2"):
        world.start("triage/9")
    with pytest.raises(InputError, match="already stable"):
        world.start("triage/1", override_reason="x")
    world.start()
    with pytest.raises(ConflictError, match="runs on route"):
        world.start("triage/3", override_reason="x")
    with sqlite_database.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(rollouts)).scalar() == 1
        assert connection.execute(sa.select(sa.func.count()).select_from(experiments)).scalar() == 1


@pytest.mark.parametrize("shares", [{"a/1": 0.5, "a/2": 0.4}, {"a/1": 1.5, "a/2": -0.5}, {"a/1": float("nan")}])
def test_shares_must_sum_to_one(shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must"):
        check_shares(shares)


def test_a_candidate_that_cannot_be_served_fails_the_rollout(sqlite_database: Engine) -> None:
    world = World(sqlite_database, demo_settings(), population())
    for refuses, broken in (("rank 128 is over 64", None), (None, "HTTP 500")):
        world.servables.refuses, world.routers.broken = refuses, broken
        rollout = world.run(world.start().rollout_id, seconds=6, traffic=False)
        assert rollout.state == "failed" and str(refuses or broken) in str(rollout.reason)
        assert world.route.candidate is None


# People


def test_without_auto_rollout_people_approve_each_stage(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = demo_settings().model_copy(
        update={"automation": demo_settings().automation.model_copy(update={"auto_rollout": False})}
    )
    world = World(database, settings, population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    for stage in range(4):
        rollout = world.run(rollout_id, seconds=10, traffic=False)
        assert (rollout.state, rollout.stage) == ("awaiting_approval", stage)
        approve(world.steps, rollout_id, ANN)  # type: ignore[arg-type]
    assert world.run(rollout_id, seconds=2, traffic=False).state == "promoted"
    assert [d["actor"] for d in world.decisions() if d["outcome"] == "approve"] == [ANN] * 4


def test_rollback_by_hand_works_at_once_and_without_a_controller(database: Engine) -> None:
    world = World(database, demo_settings(), population())
    rollout = world.run(world.start().rollout_id, seconds=3)
    assert world.route.share == 0.1
    rollout = roll_back(world.steps, rollout.rollout_id, ANN, "a customer called")  # type: ignore[arg-type]
    assert (rollout.state, world.route.share, world.route.candidate) == ("rolled_back", 0.0, None)
    assert world.registry.tags["triage/2", "rayloop.rolled_back"] == f"rolled back by {ANN}: a customer called"
    with pytest.raises(ConflictError, match="is rolled_back"):
        roll_back(world.steps, rollout.rollout_id, ANN, "again")  # type: ignore[arg-type]


def test_a_promotion_can_be_taken_back_within_its_window(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(database, demo_settings(restore_window_s=100), population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    assert world.run(rollout_id, traffic=False).state == "promoted"
    assert roll_back(world.steps, rollout_id, ANN, "worse after all").state == "rolled_back"  # type: ignore[arg-type]
    assert (world.route.stable, world.registry.aliases["champion"]) == ("triage/1", "triage/1")


def test_a_freeze_stops_growth_until_it_is_lifted(sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(sqlite_database, demo_settings(), population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    world.run(rollout_id, seconds=3, traffic=False)
    assert freeze(world.steps, rollout_id, ANN, "holiday").state == "holding"  # type: ignore[arg-type]
    rollout = world.run(rollout_id, seconds=100, traffic=False)
    assert (rollout.state, rollout.stage, world.route.share) == ("holding", 0, 0.1)
    assert unfreeze(world.steps, rollout_id, ANN).state == "running"  # type: ignore[arg-type]
    assert world.run(rollout_id, traffic=False).state == "promoted"


def test_a_persons_edit_of_the_route_is_noticed_and_respected(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(database, demo_settings(), population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    world.run(rollout_id, seconds=3, traffic=False)
    update_route(database, world.key, {"share": 0.02}, writer="person:bob")
    rollout = world.run(rollout_id, seconds=100, traffic=False)
    assert (rollout.state, world.route.share) == ("holding", 0.02)
    assert "changed by person:bob" in world.decisions()[-1]["reason"]
    unfreeze(world.steps, rollout_id, ANN)  # type: ignore[arg-type]
    assert world.route.share == 0.1
    assert world.run(rollout_id, traffic=False).state == "promoted"


def test_a_rollback_leaves_a_route_alone_that_a_person_gave_to_another_version(
    sqlite_database: Engine,
) -> None:
    world = World(sqlite_database, demo_settings(), population())
    rollout = world.run(world.start().rollout_id, seconds=3)
    update_route(sqlite_database, world.key, {"candidate": "triage/3", "share": 0.3}, writer="person:bob")
    roll_back(world.steps, rollout.rollout_id, ANN, "tidy up")  # type: ignore[arg-type]
    assert (world.route.candidate, world.route.share) == ("triage/3", 0.3)


def test_pinning_holds_and_the_ceiling_of_the_config_is_kept(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(sqlite_database, demo_settings(), population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    world.run(rollout_id, seconds=3, traffic=False)
    update_route(sqlite_database, world.key, {"max_share": 0.3}, writer="config")
    rollout = world.run(rollout_id, seconds=20, traffic=False)
    assert (rollout.stage, world.route.share) == (1, 0.25)
    assert rollout.progress["last_code"] == "ceiling"
    update_route(sqlite_database, world.key, {"pinned": True}, writer="person:bob")
    assert world.run(rollout_id, seconds=2, traffic=False).progress["last_code"] == "edited"


def test_a_ceiling_below_the_stage_reached_holds_and_comes_back_at_the_limit(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(sqlite_database, demo_settings(hold_limit_s=10), population())
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    while world.route.live_share < 0.25:
        world.run_on(1, traffic=False)
    update_route(sqlite_database, world.key, {"max_share": 0.2}, writer="config")
    rollout = world.run(rollout_id, seconds=3, traffic=False)
    assert (rollout.state, rollout.progress["last_code"], world.route.live_share) == ("holding", "ceiling", 0.2)
    ended = world.run(rollout_id, seconds=12, traffic=False)
    assert (ended.state, world.route.live_share) == ("rolled_back", 0.0)
