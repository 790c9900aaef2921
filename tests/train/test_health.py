import math

import pytest

from cluster.errors import HealthGateError
from cluster.settings.training import HealthSettings
from train.health import HealthWatch, check_changed, warnings_for

SETTINGS = HealthSettings(window_steps=3, collapse_nats_per_token=1.0)


def watch() -> HealthWatch:
    return HealthWatch(SETTINGS, beta=0.1, answer_tokens=10)


def test_chosen_collapse_with_growing_margin_stops_the_run() -> None:
    with pytest.raises(HealthGateError, match=r"lost .* nats a token by step \d+ while the margin grew"):
        collapsing = watch()
        for step in range(20):  # chosen falls by 2 nats a step: 0.2 a token
            chosen = -0.1 * 2 * step
            collapsing.observe(step, {"rewards/chosen": chosen, "rewards/margins": 0.05 * step})


def test_healthy_preference_run_is_quiet() -> None:
    healthy = watch()
    for step in range(200):
        healthy.observe(
            step, {"loss": 0.7 - step / 400, "rewards/chosen": -0.002 * step, "rewards/margins": 0.02 * step}
        )


def test_falling_chosen_without_growing_margin_is_another_matter() -> None:
    stuck = watch()
    for step in range(20):
        stuck.observe(step, {"rewards/chosen": -5.0, "rewards/margins": 0.0})


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_stop_the_run(name: str, value: float) -> None:
    with pytest.raises(HealthGateError, match=f"{name} is {value} at step 7"):
        watch().observe(7, {name: value})


@pytest.mark.parametrize("length", [30.0, 2.0])
def test_length_drift_stops_the_run(length: float) -> None:
    drifting = watch()
    drifting.observe_length(0, 10.0)
    drifting.observe_length(10, 13.0)
    with pytest.raises(HealthGateError, match="drifted"):
        drifting.observe_length(20, length)


def test_without_reference_answers_length_is_held_against_the_first_answers() -> None:
    alone = HealthWatch(SETTINGS, beta=0.1, answer_tokens=None)
    alone.observe_length(0, 10.0)
    alone.observe_length(10, 13.0)
    with pytest.raises(HealthGateError, match="drifted"):
        alone.observe_length(20, 30.0)


def test_answers_that_were_long_from_the_start_are_no_drift() -> None:
    verbose = watch()
    verbose.observe_length(0, 30.0)
    verbose.observe_length(10, 32.0)


def test_unchanged_adapter_is_an_error_and_a_faint_one_a_warning() -> None:
    with pytest.raises(HealthGateError, match="changed nothing"):
        check_changed(0.0, True, SETTINGS)
    assert check_changed(1e-6, False, SETTINGS)
    assert not check_changed(0.1, False, SETTINGS)


def test_fragile_dpo_is_warned_about() -> None:
    import pyarrow as pa

    mixed, corrections = pa.table({"origin": ["correction", "similar_query"]}), pa.table({"origin": ["correction"]})
    assert warnings_for("dpo", 1.0, mixed) == []
    assert "without the SFT term" in warnings_for("dpo", 0.0, mixed)[0]
    assert "corrections alone" in warnings_for("dpo", 1.0, corrections)[0]


def group(flat: float, reward: float = 0.5, abstained: float = 0.0) -> dict[str, float]:
    return {"frac_reward_zero_std": flat, "reward": reward, "abstained": abstained}


def test_reward_spread_that_is_gone_for_good_stops_the_run() -> None:
    flat = watch()
    for step in range(5):
        flat.observe(step, group(1.0))
    with pytest.raises(HealthGateError, match="no advantage left: in 100% of the groups of the last 6 steps"):
        flat.observe(5, group(1.0))


@pytest.mark.parametrize(("share", "reward"), [(0.54, 0.5), (0.85, 0.5), (1.0, 0.97)])
def test_many_flat_groups_and_a_solved_task_are_healthy(share: float, reward: float) -> None:
    healthy = watch()
    for step in range(100):
        healthy.observe(step, group(share, reward))


def test_flat_batches_among_others_are_no_trend() -> None:
    uneven = watch()
    for step in range(100):
        uneven.observe(step, group(1.0 if step % 3 else 0.4))


def test_grader_that_keeps_abstaining_stops_the_run() -> None:
    blind = watch()
    for step in range(2):
        blind.observe(step, {"frac_reward_zero_std": 0.0, "reward": None, "abstained": 0.8})
    with pytest.raises(HealthGateError, match="abstained on 80% of the answers"):
        blind.observe(2, group(0.0, abstained=0.8))
