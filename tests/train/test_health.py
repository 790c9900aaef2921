import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.errors import HealthGateError
from cluster.settings.training import HealthSettings
from train.callbacks import HealthCallback
from train.checkpoint import STATE, load_scaler
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
    first, last = healthy.history[:3], healthy.history[3:]
    assert [row["chosen"] for row in first] == pytest.approx([0.0, -0.002, -0.004])
    assert [row["margin"] for row in last] == pytest.approx([3.94, 3.96, 3.98])  # steps 197 to 199
    with pytest.raises(HealthGateError, match=r"lost 1\.33 nats a token by step 200"):  # it had not stopped looking
        healthy.observe(200, {"rewards/chosen": -3.2, "rewards/margins": 4.0})


def test_falling_chosen_without_growing_margin_is_another_matter() -> None:
    stuck = watch()
    for step in range(20):
        stuck.observe(step, {"rewards/chosen": -5.0, "rewards/margins": 0.0})
    assert stuck.history == [{"chosen": -5.0, "margin": 0.0}] * 6  # 5 nats a token lost, and no margin that grew
    with pytest.raises(HealthGateError, match=r"lost 5\.00 nats a token by step 20 while the margin grew"):
        stuck.observe(20, {"rewards/chosen": -5.0, "rewards/margins": 0.1})


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
    assert verbose.start_length_ratio == 3.0  # of the 10 tokens of the reference answers
    with pytest.raises(HealthGateError, match=r"drifted to 6\.0 times .* \(3\.0 at the start\)"):
        verbose.observe_length(20, 60.0)


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
    assert healthy.groups == [{"flat": share, "abstained": 0.0, "reward": reward}] * 6
    with pytest.raises(HealthGateError, match="no advantage left"):
        for step in range(100, 106):
            healthy.observe(step, group(1.0))


def test_flat_batches_among_others_are_no_trend() -> None:
    uneven = watch()
    for step in range(100):
        uneven.observe(step, group(1.0 if step % 3 else 0.4))
    assert [row["flat"] for row in uneven.groups] == [1.0, 1.0, 0.4, 1.0, 1.0, 0.4]  # steps 94 to 99: 0.8 in the mean
    with pytest.raises(HealthGateError, match="no advantage left"):
        for step in range(100, 106):
            uneven.observe(step, group(1.0))


def test_grader_that_keeps_abstaining_stops_the_run() -> None:
    blind = watch()
    for step in range(2):
        blind.observe(step, {"frac_reward_zero_std": 0.0, "reward": None, "abstained": 0.8})
    with pytest.raises(HealthGateError, match="abstained on 80% of the answers"):
        blind.observe(2, group(0.0, abstained=0.8))


def pair_step(chosen: float, margin: float) -> dict[str, float]:
    return {"rewards/chosen": chosen, "rewards/margins": margin}


def test_watch_of_a_resumed_run_knows_what_the_killed_one_saw() -> None:
    killed, resumed = watch(), watch()
    killed.observe_length(0, 10.0)
    for step in range(50):
        killed.observe(step, pair_step(-0.01 * step, 0.01 * step) | group(0.5 if step < 45 else 0.2))
    resumed.restore(json.loads(json.dumps(killed.state())))
    assert resumed == killed and len(killed.history) == len(killed.groups) == 2 * SETTINGS.window_steps
    with pytest.raises(HealthGateError, match=r"drifted to 3\.0 times .* \(1\.0 at the start\)"):
        resumed.observe_length(50, 30.0)
    with pytest.raises(HealthGateError, match="the chosen answers lost"):
        for step in range(50, 53):
            resumed.observe(step, pair_step(-20.0, 9.0))


def test_resumed_run_does_not_take_drifted_answers_for_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.callbacks.greedy_lengths", lambda *_: 30.0)
    known = watch()
    known.observe_length(0, 10.0)
    callback = HealthCallback(SimpleNamespace(model=None), known, [[1]], None, 32)
    callback.on_train_begin(None, SimpleNamespace(global_step=10), None)
    assert known.start_length_ratio == 1.0
    with pytest.raises(HealthGateError, match="drifted"):
        callback.on_evaluate(None, SimpleNamespace(global_step=20), None)


def test_loss_scale_of_fp16_goes_on_as_it_was(tmp_path: Path) -> None:
    scaled, fresh = (SimpleNamespace(accelerator=SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))) for _ in "ab")
    scaled.accelerator.scaler.load_state_dict({**fresh.accelerator.scaler.state_dict(), "scale": 1024.0})
    state = {"scaler": scaled.accelerator.scaler.state_dict()}
    (tmp_path / STATE).write_text(json.dumps(state))
    load_scaler(fresh, tmp_path)
    assert fresh.accelerator.scaler.state_dict()["scale"] == 1024.0
