"""`decide` as a table: one reason at a time, everything else in order."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from cluster.settings import load_settings
from serve.experiments.evidence import AnomalyReading, ArmReading, Evidence, Reading, SplitReading
from serve.rollout.decide import decide
from serve.rollout.replay import replay
from serve.rollout.state import Decision, Look, RolloutConfig, RolloutState

NOBODY = ArmReading(0, 0, None)
HOUR_US = 3_600_000_000
NOW_US = 1_000 * HOUR_US


def reading(metric: str = "satisfaction", harm: float = -0.2, users: int = 2000, **values: Any) -> Reading:
    """A metric whose harm is known to 0.01 either way; margin 0.05."""
    arms = ArmReading(users, 5.0 * users, 0.5), ArmReading(users, 5.0 * users, 0.5 + harm)
    known: dict[str, Any] = {
        "margin": 0.05,
        "effect": -harm,
        "harm": harm,
        "harm_low": harm - 0.01,
        "harm_high": harm + 0.01,
        "z": -100 * harm,
        "information": 1e4,
    }
    return Reading(metric, *arms, **(known | values))


def evidence(**values: Any) -> Evidence:
    good: dict[str, Any] = {
        "experiment_id": "exp",
        "period": "ramp",
        "primary": reading(),
        "guardrails": (reading("error_rate", 0.0), reading("latency_over_slo", 0.0)),
        "optional_guardrails": (reading("rating", 0.0),),
        "split": SplitReading({"candidate": 2000, "stable": 2000}, {"candidate": 2000, "stable": 2000}, 1.0, 1.0),
        "exposed": {"candidate": 2000, "control": 2000},
        "first_requests": 20,
        "last_seen_us": {"candidate": NOW_US, "stable": NOW_US},
    }
    return Evidence(**(good | values))


def state(stage: int = 0, **values: Any) -> RolloutState:
    known: dict[str, Any] = {"state": "running", "stage": stage, "stage_started_us": NOW_US - 25 * HOUR_US}
    return RolloutState(**(known | values))


def config(**values: Any) -> RolloutConfig:
    return RolloutConfig.of(load_settings(automation={"auto_rollout": True} | values)[0])


def outcome(decision: Decision) -> tuple[str, str]:
    return decision.outcome, decision.code


SIGNIFICANT = (Look(0.5, 5.0, 2.5),)


def test_anomaly_that_the_statistics_bear_out_is_a_breached_guardrail() -> None:
    found = evidence(anomalies=(AnomalyReading("latency", "latency 3.2, above 1", True),))
    assert outcome(decide(state(), found, config(), NOW_US)) == ("rollback", "anomaly")
    kept = config(rollback_on_regression=False)
    assert outcome(decide(state(), found, kept, NOW_US)) == ("hold", "anomaly")
    assert Evidence.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_anomaly_that_may_be_chance_is_said_with_every_step_forward_and_stops_none() -> None:
    found = evidence(anomalies=(AnomalyReading("safety", "safety 0.08, above 0.02", False),))
    decided = decide(state(), found, config(), NOW_US)
    assert decided.outcome == "advance" and "may be chance: safety 0.08" in decided.reason


def test_after_a_promotion_a_guardrail_restores_and_an_anomaly_does_not() -> None:
    seen = (AnomalyReading("latency", "latency 3.2, above 1", True),)
    promoted = state(3, state="promoted")
    kept = decide(promoted, evidence(anomalies=seen, first_errors=9), config(), NOW_US)
    assert outcome(kept) == ("hold", "watching")
    harmed = decide(promoted, evidence(guardrails=(reading("error_rate", 0.5),)), config(), NOW_US)
    assert outcome(harmed) == ("rollback", "guardrail") and harmed.details == {"restores": True}


@pytest.mark.parametrize(
    ("stage", "expected", "share"),
    [(0, "advance", 0.25), (1, "advance", 0.5), (2, "advance", 0.95), (3, "promote", 0.0)],
)
def test_a_good_candidate_passes_every_stage(stage: int, expected: str, share: float) -> None:
    decided = decide(state(stage, looks=SIGNIFICANT), evidence(), config(), NOW_US)
    assert (decided.outcome, decided.share) == (expected, share)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("too_few_users", {"primary": reading(users=199)}),
        ("too_few_users", {"primary": Reading("satisfaction", NOBODY, NOBODY, problem="no data")}),
        ("missing", {"guardrails": (Reading("error_rate", NOBODY, NOBODY, problem="no data"),)}),
        ("not_a_number", {"primary": reading(harm=math.nan)}),
        ("not_a_number", {"primary": reading(z=math.nan)}),
        ("not_a_number", {"guardrails": (reading("error_rate", harm_high=math.inf),)}),
        ("not_a_number", {"primary": replace(reading(), problem="not a number", harm=None)}),
        ("stale", {"last_seen_us": {"candidate": NOW_US, "stable": NOW_US - HOUR_US}}),
        ("stale", {"last_seen_us": {}}),
        ("split_broken", {"split": SplitReading({}, {}, 0.0009)}),
        ("split_broken", {"split": SplitReading({}, {}, math.nan)}),
        ("regression", {"guardrails": (reading("error_rate", 0.06, harm_low=-0.01),)}),
        ("regression", {"primary": reading(harm=0.06, harm_low=-0.01)}),
    ],
)  # fmt: skip
def test_what_cannot_be_relied_on_holds_at_every_stage(code: str, changes: dict[str, Any]) -> None:
    for stage in range(4):
        decided = decide(state(stage, looks=SIGNIFICANT), evidence(**changes), config(), NOW_US)
        assert outcome(decided) == ("hold", code)
        assert decided.to_state == "holding" and decided.to_stage == stage


def test_no_evidence_holds() -> None:
    assert outcome(decide(state(), None, config(), NOW_US)) == ("hold", "unavailable")


def test_a_hold_past_its_limit_rolls_back_whatever_the_reason() -> None:
    held = state(state="holding", holding_since_us=NOW_US - 73 * HOUR_US)
    for seen in (None, evidence(), evidence(primary=reading(harm=math.nan))):
        decided = decide(held, seen, config(), NOW_US)
        assert outcome(decided) == ("rollback", "held_too_long")
        assert decided.ends_as == "inconclusive"
    assert (
        decide(state(state="holding", holding_since_us=NOW_US - 71 * HOUR_US), None, config(), NOW_US).outcome == "hold"
    )


@pytest.mark.parametrize(
    ("harm", "low", "expected"),
    [
        (0.2, 0.1, ("rollback", "guardrail")),  # worse for certain, and by more than the margin
        (0.04, 0.03, ("advance", "passed")),  # certain but small
        (0.2, -0.01, ("hold", "regression")),  # large but uncertain
    ],
)
def test_a_guardrail_needs_certainty_and_size(harm: float, low: float, expected: tuple[str, str]) -> None:
    for name in ("guardrails", "optional_guardrails"):
        seen = evidence(**{name: (reading("error_rate", harm, harm_low=low),)})
        assert outcome(decide(state(), seen, config(), NOW_US)) == expected


def test_harm_to_the_primary_rolls_back_at_once_even_within_the_stage() -> None:
    fresh = state(stage_started_us=NOW_US)
    assert outcome(decide(fresh, evidence(primary=reading(harm=0.3)), config(), NOW_US)) == (
        "rollback",
        "guardrail",
    )


def test_few_users_do_not_breach_a_guardrail() -> None:
    seen = evidence(primary=reading(harm=0.3, users=29))
    assert outcome(decide(state(), seen, config(), NOW_US)) == ("hold", "too_few_users")


def test_errors_among_the_first_requests_stop_without_statistics() -> None:
    fresh = state(stage_started_us=NOW_US)
    assert decide(fresh, evidence(first_requests=8, first_errors=5), config(), NOW_US).outcome == "hold"
    decided = decide(fresh, evidence(first_requests=8, first_errors=6), config(), NOW_US)
    assert outcome(decided) == ("rollback", "first_requests")


def test_without_automatic_rollback_a_breach_holds() -> None:
    by_hand = config(rollback_on_regression=False)
    assert outcome(decide(state(), evidence(primary=reading(harm=0.3)), by_hand, NOW_US)) == (
        "hold",
        "guardrail",
    )


def test_a_stage_lasts_its_time() -> None:
    decided = decide(state(stage_started_us=NOW_US - HOUR_US), evidence(), config(), NOW_US)
    assert (decided.outcome, decided.code, decided.to_state) == ("hold", "waiting", "running")


def test_stages_ask_for_more_and_more() -> None:
    flat = evidence(primary=reading(harm=0.0))
    assert decide(state(0), flat, config(), NOW_US).outcome == "advance"
    assert outcome(decide(state(1), flat, config(), NOW_US)) == ("hold", "no_trend")
    slight = evidence(primary=reading(harm=-0.001, z=0.1))
    assert decide(state(1), slight, config(), NOW_US).outcome == "advance"
    assert outcome(decide(state(2), slight, config(), NOW_US)) == ("hold", "inconclusive")


def test_a_guardrail_must_be_non_inferior_before_the_last_stage() -> None:
    vague = evidence(guardrails=(reading("error_rate", 0.0, harm_high=0.06),))
    assert decide(state(1), vague, config(), NOW_US).outcome == "advance"
    assert outcome(decide(state(2, looks=SIGNIFICANT), vague, config(), NOW_US)) == ("hold", "not_excluded")


def test_looks_are_made_once_each_and_remembered() -> None:
    def seen(z: float, information: float) -> Evidence:
        return evidence(primary=reading(z=z, information=information))

    planned = config()  # (1.645 + 0.842)^2 / 0.05^2 = 2473
    early = decide(state(2), seen(9.0, 600), planned, NOW_US)
    assert (early.look, early.code) == (None, "not_significant")
    first = decide(state(2), seen(2.0, 700), planned, NOW_US)
    assert first.look is not None and not first.look.is_crossed
    assert math.isclose(first.look.fraction, 700 / 2473, rel_tol=1e-3)
    again = decide(state(2, looks=(first.look,)), seen(9.0, 1000), planned, NOW_US)
    assert (again.outcome, again.look) == ("hold", None)
    second = decide(state(2, looks=(first.look,)), seen(3.0, 1300), planned, NOW_US)
    assert second.look is not None and second.look.is_crossed
    assert second.outcome == "advance"
    later = decide(state(2, looks=(first.look, second.look)), seen(1.0, 9999), planned, NOW_US)
    assert (later.outcome, later.look) == ("advance", None)


def test_promotion_needs_a_look_that_crossed() -> None:
    unproven = state(3, looks=(Look(1.0, 1.0, 1.7),))
    assert outcome(decide(unproven, evidence(), config(), NOW_US)) == ("hold", "not_significant")


def test_the_last_stage_has_its_own_minimum() -> None:
    few, automatic = evidence(primary=reading(users=200)), {"auto_rollout": True}
    smaller = load_settings(automation=automatic, rollout={"final_min_users_per_arm": 200})[0]
    assert decide(state(3, looks=SIGNIFICANT), few, RolloutConfig.of(smaller), NOW_US).outcome == "promote"
    assert decide(state(2, looks=SIGNIFICANT), few, RolloutConfig.of(smaller), NOW_US).code == "too_few_users"
    assert decide(state(3, looks=SIGNIFICANT), few, config(), NOW_US).code == "too_few_users"


def test_without_auto_rollout_each_step_waits_for_a_person() -> None:
    manual = config(auto_rollout=False)
    asked = decide(state(0), evidence(), manual, NOW_US)
    assert (asked.outcome, asked.to_state, asked.share) == ("await_approval", "awaiting_approval", 0.1)
    assert decide(state(0, approved_stage=1), evidence(), manual, NOW_US).outcome == "advance"
    assert decide(state(1, approved_stage=1), evidence(), manual, NOW_US).outcome == "await_approval"
    assert decide(state(3, looks=SIGNIFICANT, approved_stage=4), evidence(), manual, NOW_US).outcome == "promote"
    held = decide(state(0, approved_stage=1), evidence(primary=reading(users=10)), manual, NOW_US)
    assert held.outcome == "hold"


def test_a_broken_split_is_not_forgotten() -> None:
    decided = decide(state(split_broken=True), evidence(), config(), NOW_US)
    assert outcome(decided) == ("hold", "split_broken") and decided.split_broken


def test_a_freeze_or_an_edited_route_holds_without_limit_but_harm_still_rolls_back() -> None:
    for why in ({"frozen_by": "person:ann"}, {"edited_by": "person:ann"}):
        held = state(state="holding", holding_since_us=NOW_US - 999 * HOUR_US, **why)
        assert decide(held, evidence(), config(), NOW_US).outcome == "hold"
        assert decide(held, evidence(primary=reading(harm=0.3)), config(), NOW_US).outcome == "rollback"


def test_the_ceiling_of_the_route_holds() -> None:
    assert outcome(decide(state(1, max_share=0.3), evidence(), config(), NOW_US)) == ("hold", "ceiling")
    assert decide(state(0, max_share=0.3), evidence(), config(), NOW_US).outcome == "advance"
    last = state(3, looks=SIGNIFICANT, max_share=0.99)
    assert outcome(decide(last, evidence(), config(), NOW_US)) == ("hold", "ceiling")


def test_a_record_replays_to_the_same_decision() -> None:
    for at, seen in (
        (state(2), evidence()),
        (state(0), None),
        (state(1), evidence(primary=reading(harm=0.3))),
    ):
        decided = decide(at, seen, config(), NOW_US)
        record = {
            "state": at.as_json(),
            "evidence": seen.as_json() if seen else None,
            "config": config().model_dump(mode="json"),
            "now_us": NOW_US,
        }
        assert replay(json.loads(json.dumps(record))) == decided
        assert Decision.from_json(json.loads(json.dumps(decided.as_json()))) == decided


def test_an_improvement_of_any_primary_suffices_at_its_share_of_alpha() -> None:
    flat = reading(harm=-0.001, z=0.1, harm_low=-0.02, harm_high=0.02)
    second = reading("rating", z=2.3)
    settings = load_settings(automation={"auto_rollout": True}, experiment={"further_primaries": ["rating"]})[0]
    two = RolloutConfig.of(settings)
    seen = evidence(primary=flat, further_primaries=(second,), optional_guardrails=())
    first = decide(state(2), seen, two, NOW_US)
    assert outcome(first) == ("hold", "not_significant") and first.look is not None and first.look.metric == ""
    then = decide(state(2, looks=(first.look,)), seen, two, NOW_US)
    assert then.outcome == "advance" and then.look is not None and then.look.metric == "rating"
    assert then.look.boundary == pytest.approx(1.95996, abs=1e-4)  # alpha .05 over two primaries, one look
    worse = replace(seen, further_primaries=(reading("rating", 0.06, harm_low=-0.01),))
    assert outcome(decide(state(2), worse, two, NOW_US)) == ("hold", "regression")


def test_unequal_response_rates_are_said_with_every_step_forward() -> None:
    fewer = replace(
        reading("feedback_response_rate", 0.06, harm_low=-0.01, harm_high=0.13, e_value=1.0),
        candidate=ArmReading(2000, 1e4, 0.12),
        control=ArmReading(2000, 1e4, 0.18),
    )
    decided = decide(state(0), evidence(response=fewer), config(), NOW_US)
    assert decided.outcome == "advance"
    assert "react less often as it looks (0.12 against 0.18 of answers)" in decided.reason
    same = replace(fewer, harm=0.001, candidate=ArmReading(2000, 1e4, 0.179))
    assert "react" not in decide(state(0), evidence(response=same), config(), NOW_US).reason
    certain = replace(same, e_value=21.0)
    assert "less often for certain" in decide(state(0), evidence(response=certain), config(), NOW_US).reason
