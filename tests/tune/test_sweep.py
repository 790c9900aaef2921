"""A real sweep on the tiny model: trials, nested runs, the choice, and going on after an interruption."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster import tracking
from cluster.clock import SECOND_US, now_us
from cluster.database import connect
from cluster.errors import ConflictError, DatasetError, InputError, NotFoundError, RayloopError
from cluster.jobs import Jobs
from cluster.registry import NEEDS_RETRAINING_TAG, Registry
from cluster.settings import Settings, load_settings
from cluster.settings.training import LimitSettings
from cluster.tables import training_jobs
from data.log import EventLog
from data.manifest import load_manifest, write_manifest
from tests.datasets import write_feedback_dataset
from tests.serve.engines.models import build_adapter, build_base
from tune import sweep as sweeps
from tune.cli import training_command
from tune.job import job_again, new_job, tell
from tune.objective import axes_of
from tune.report import Trial
from tune.search import check_room
from tune.space import contains
from tune.spec import Sweep, new_sweep, read_sweep, write_sweep
from tune.sweep import check_any_ran, make_plan, pin, resume_sweep, run_sweep
from tune.trial import Plan, rungs_of

ROOT = Path(__file__).parents[2]
EMPTY = Plan({}, None, "", (0.5, 1.0), 1, axes_of("dpo", 0.1))


def sweep_settings(settings: Settings, trials: int = 3) -> Settings:
    quick = {"learning_rate": 1e-2, "epochs": 1}
    training = {"batch_size": 32, "gradient_accumulation": 1, "warmup_steps": 2, "dpo": quick}
    sweep = {"trials": trials, "validation_prompts": 16, "kl_samples": 1, "kl_limit": 10}
    return load_settings(home=settings.home, training=training, sweep=sweep, evaluation={"max_new_tokens": 24})[0]


def test_new_sweep_refuses_unknown_fields_and_methods(settings: Settings) -> None:
    for method, ranges, message in (("dpo", {"rank": "1:2"}, "no field"), ("ppo", {}, "must be one of")):
        with pytest.raises(InputError, match=message):
            new_sweep(settings, method=method, dataset="d", base="b", ranges=ranges)
    for scheduler, ranges, message in (("best", {}, "must be one of"), ("pbt", {"epochs": "1,2"}, "needs one of")):
        with pytest.raises(InputError, match=message):
            new_sweep(settings, method="sft", dataset="d", base="b", ranges=ranges, scheduler=scheduler, grid=True)
    sweep = new_sweep(settings, method="sft", dataset="d", base="b", ranges={"batch_size": "8,16"})
    assert list(sweep.space) == ["learning_rate", "batch_size"]
    assert "lora.r" in new_sweep(settings, method="dpo", dataset="d", base="b", ranges={"lora.r": "8,16"}).space


def test_a_sweep_over_ranks_that_no_engine_loads_is_refused(settings: Settings) -> None:
    limit = settings.engine.max_rank
    for text in (f"8,{limit + 1}", f"8:{limit + 1}"):
        with pytest.raises(InputError, match=rf"training\.lora\.r={limit + 1}.* is over engine\.max_rank"):
            new_sweep(settings, method="dpo", dataset="d", base="b", ranges={"lora.r": text})
    new_sweep(settings, method="reward", dataset="d", base="b", ranges={"lora.r": f"8,{limit + 1}"})


@pytest.mark.parametrize(
    ("method", "name", "text", "message"),
    [
        ("dpo", "learning_rate", "0.5:2", r"train\.learning_rate=2\.0 input should be less than or equal to 1"),
        ("dpo", "learning_rate", "fast", r"train\.learning_rate='fast' input should be a valid number"),
        ("dpo", "batch_size", "0,8", r"train\.batch_size=0 "),
        ("dpo", "batch_size", "2.5:8", r"takes whole numbers"),
        ("dpo", "schedule", "linear,steep", r"train\.schedule='steep' input should be 'linear', 'cosine' or"),
        ("dpo", "epochs", "1:1000", r"exceeds training\.limits\.max_epochs"),
        ("dpo", "weights", "lora,full", "is the same for all trials"),
        ("dpo", "base_model", "a/b,c/d", "is the same for all trials"),
        ("sft", "beta", "0.1,0.2", "has no meaning for sft"),
    ],
)
def test_values_that_no_trial_could_train_with_are_refused(
    method: str, name: str, text: str, message: str, settings: Settings
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        new_sweep(settings, method=method, dataset="d", base="b", ranges={name: text})
    assert "\n" not in str(caught.value)


def test_a_field_without_a_value_may_be_varied(settings: Settings, tmp_path: Path) -> None:
    sweep = new_sweep(settings, method="dpo", dataset="d", base="b", ranges={"max_steps": "5:9"})
    assert not contains(sweep.space, {"learning_rate": 5e-5, "beta": 0.1, "max_steps": None})


def test_whole_models_are_not_swept(settings: Settings) -> None:
    whole = load_settings(home=settings.home, training={"weights": "full"})[0]
    with pytest.raises(InputError, match=r"training\.weights='full' cannot be swept"):
        new_sweep(whole, method="dpo", dataset="d", base="b")


def test_trials_that_the_cluster_could_never_hold_are_refused(settings: Settings) -> None:
    greedy = settings.sweep.model_copy(update={"gpus_per_trial": 1.0})
    with pytest.raises(InputError, match=r"sweep\.gpus_per_trial=1\.0 is more than the cluster has \(0\)"):
        check_room(greedy, {"CPU": 6.0})
    check_room(greedy, {"CPU": 6.0, "GPU": 1.0})


def test_a_sweep_starts_where_a_training_of_its_agent_would(mlflow_settings: Settings, tmp_path: Path) -> None:
    settings, registry = mlflow_settings, Registry(mlflow_settings)
    made = write_feedback_dataset(settings.home / "datasets", users=10)
    write_feedback_dataset(settings.home / "datasets", users=10, agent="zebra")  # the latest of all
    bases = [build_base(tmp_path / name, hidden=32) for name in ("first", "second")]
    registry.register_base("triage", bases[0])
    adapter = build_adapter(bases[1], tmp_path / "adapter", seed=0)
    version = registry.register_adapter("triage", adapter, base_model=bases[1])
    from_champion = pin(settings, new_sweep(settings, method="dpo", dataset="latest", agent="triage"))
    assert (Path(from_champion.dataset).name, from_champion.base) == (made.dataset_id, str(bases[0].resolve()))
    by_name = new_sweep(settings, method="dpo", dataset=made.dataset_id, base=f"models:/{version.id}")
    assert (pin(settings, by_name).base, pin(settings, by_name).agent) == (version.id, "triage")
    registry.tag(version, NEEDS_RETRAINING_TAG, "{}")
    pinned = pin(settings, by_name)
    with pytest.raises(ConflictError, match="cannot be trained further"):
        make_plan(settings, pinned, Path(pinned.dataset))
    write_manifest(Path(pinned.dataset), replace(load_manifest(Path(pinned.dataset)), erased_rows=1))
    with pytest.raises(DatasetError, match=r"1 examples of .* were erased since"):
        make_plan(settings, from_champion, Path(from_champion.dataset))


def test_the_chosen_point_becomes_a_command_that_train_run_takes() -> None:
    point = {"learning_rate": 2e-4, "schedule": "cosine", "lora.r": 8, "sft_weight": 0.5, "batch_size": 16}
    assert training_command("dpo", "triage-1", "triage/1", point) == (
        "RAYLOOP_TRAINING__SCHEDULE=cosine RAYLOOP_TRAINING__LORA__R=8 RAYLOOP_TRAINING__DPO__SFT_WEIGHT=0.5 "
        "rayloop train run --method dpo --dataset triage-1 --base triage/1 --learning-rate 0.0002 --batch-size 16"
    )


def small_sweep(settings: Settings) -> Sweep:
    made = write_feedback_dataset(settings.home / "datasets", users=10)
    return new_sweep(settings, method="dpo", dataset=str(settings.home / "datasets" / made.dataset_id), base="b")


def test_a_sweep_is_a_job_from_its_beginning_to_its_end(settings: Settings, sqlite_database: Engine) -> None:
    sweep, jobs = small_sweep(settings), Jobs(sqlite_database, settings.tenant, settings.workspace)
    with pytest.raises(RuntimeError), new_job(settings, sweep):
        tell(settings, sweep.sweep_id, 3, 8)
        job = jobs.get(sweep.sweep_id)
        assert (job.kind, job.state, job.agent) == ("tune", "running", "triage")
        assert job.progress is not None and (job.progress["ended"], job.progress["trials"]) == (3, 8)
        with pytest.raises(ConflictError, match="still runs"), job_again(settings, sweep.sweep_id):
            pass
        raise RuntimeError("the cluster is gone")
    assert (jobs.get(sweep.sweep_id).state, jobs.get(sweep.sweep_id).error) == ("failed", "the cluster is gone")
    for _ in range(2):
        with job_again(settings, sweep.sweep_id):
            pass
        assert jobs.get(sweep.sweep_id).state == "completed"
    ended = [(e.event.body["state"], e.event.body["job"]) for e in EventLog(sqlite_database).read(kinds=["job.ended"])]
    assert ended == [("failed", "tune"), ("completed", "tune")]


def test_a_resumed_sweep_that_fails_again_ends_its_run(
    mlflow_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, sweep = mlflow_settings, small_sweep(mlflow_settings)
    with pytest.raises(KeyboardInterrupt), new_job(settings, sweep), tracking.run(settings, "sweep") as run:
        write_sweep(settings, replace(sweep, run_id=run.run_id))
        raise KeyboardInterrupt
    seen = []

    def carry_out(*given: Any, **more: Any) -> Any:
        seen.append(tracking.client(settings).get_run(run.run_id).info.status)
        raise RayloopError("every trial failed: NaN")

    monkeypatch.setattr(sweeps, "make_plan", lambda *given: None)
    monkeypatch.setattr(sweeps, "_carry_out", carry_out)
    with pytest.raises(RayloopError, match="NaN"):
        resume_sweep(settings, sweep.sweep_id)
    assert seen == ["RUNNING"] and tracking.client(settings).get_run(run.run_id).info.status == "FAILED"


def test_a_sweep_is_kept_in_its_folder(settings: Settings) -> None:
    sweep = new_sweep(settings, method="dpo", dataset="d", base="b", ranges={"schedule": "linear,cosine"})
    write_sweep(settings, sweep)
    assert read_sweep(settings, sweep.sweep_id) == sweep
    with pytest.raises(NotFoundError, match=sweep.sweep_id):
        read_sweep(settings, "other")


def test_a_sweep_fails_with_the_reason_that_all_its_trials_failed_for() -> None:
    swapped = Trial(0, {}, None, None, status="failed", reason="pairs are swapped")
    with pytest.raises(RayloopError, match="every trial failed: pairs are swapped"):
        check_any_ran([swapped, replace(swapped, number=1)])
    check_any_ran([swapped, replace(swapped, reason="NaN")])
    check_any_ran([swapped, Trial(1, {}, 0.5, 0.01)])


def test_the_command_of_a_sweep_loads_no_torch() -> None:
    code = "import sys, tune.sweep, tune.search; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.ray
@pytest.mark.slow
def test_sweep_on_the_toy(mlflow_settings: Settings, toy_base: Path, ray_session: None) -> None:
    settings = sweep_settings(mlflow_settings)
    made = write_feedback_dataset(settings.home / "datasets", users=60)
    sweep = new_sweep(settings, method="dpo", dataset=made.dataset_id, base=str(toy_base))
    found = run_sweep(settings, sweep)
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    assert found.trials[0].config == {"learning_rate": 1e-2, "beta": 0.1}
    assert len({trial.config["learning_rate"] for trial in found.trials}) == 3
    done = [trial for trial in found.trials if trial.measured]
    assert done and all(trial.status in ("completed", "stopped") for trial in found.trials)
    assert all(Path(str(trial.adapter_dir), "adapter_model.safetensors").is_file() for trial in done)
    assert all(trial.cost is not None and trial.cost > -0.01 for trial in done)
    _check_runs(settings, found)

    again = resume_sweep(settings, sweep.sweep_id)
    assert [t.config for t in again.trials] == [t.config for t in found.trials]
    assert [t.value for t in again.trials] == [t.value for t in found.trials]


SCRIPT = """
import sys
from cluster.settings import load_settings
from tests.tune.test_sweep import planted_sweep, sweep_settings
from tune.sweep import run_sweep
settings = sweep_settings(load_settings(home=sys.argv[1])[0])
run_sweep(settings, planted_sweep(settings, sys.argv[2]))
"""
PLANTED = 1e-2


def planted_sweep(settings: Settings, base: str) -> Sweep:
    """Two configurations; one of them learns nothing. `tests/bench/sweep_resume.py` has sixteen."""
    ranges = {"learning_rate": f"1e-9,{PLANTED}", "beta": "0.1"}
    return new_sweep(
        settings, method="dpo", dataset="latest", base=base, ranges=ranges, grid=True, scheduler="none",
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(mlflow_settings: Settings, toy_base: Path, ray_session: None) -> None:
    settings = sweep_settings(mlflow_settings)
    write_feedback_dataset(settings.home / "datasets", users=60)
    place = settings.home / "sweeps"
    command = [sys.executable, "-c", SCRIPT, str(settings.home), str(toy_base)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 400
    while not list(place.glob("*/trials/*/adapter")) and process.poll() is None:
        assert time.monotonic() < deadline, "no trial ended"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    sweep_id = next(place.iterdir()).name
    found = resume_sweep(settings, sweep_id)
    assert [trial.number for trial in found.trials] == [0, 1]
    assert all(trial.status == "completed" for trial in found.trials)
    assert found.chosen is not None and found.chosen.config["learning_rate"] == PLANTED
    _check_runs(settings, found)
    job = Jobs(connect(settings), settings.tenant, settings.workspace).get(sweep_id)
    assert (job.state, job.retries) == ("completed", 1)


def _check_runs(settings: Settings, found: Any) -> None:
    client = tracking.client(settings)
    parent = client.get_run(found.run_id)
    assert parent.info.status == "FINISHED" and parent.inputs.dataset_inputs
    names = {artifact.path for artifact in client.list_artifacts(found.run_id)}
    assert {"sweep.json", "pareto.md", "pareto.png"} <= names
    query = f"tags.mlflow.parentRunId = '{found.run_id}'"
    nested = client.search_runs([parent.info.experiment_id], query)
    assert len(nested) == len(found.trials)
    for run in nested:
        assert set(run.data.params) == {"learning_rate", "beta"}
        assert run.info.status == "FINISHED" and {"win_rate", "kl"} <= set(run.data.metrics)


@pytest.mark.ray
@pytest.mark.slow
def test_a_population_of_reward_models_goes_on_from_the_better_ones(
    mlflow_settings: Settings, toy_base: Path, ray_session: None
) -> None:
    """Half of them take the places of the other half at the one rung between, and go on from there."""
    settings = sweep_settings(mlflow_settings)
    settings = settings.model_copy(
        update={"sweep": settings.sweep.model_copy(update={"rungs": 2, "exploit_share": 0.5})}
    )
    made = write_feedback_dataset(settings.home / "datasets", users=60)
    ranges = {"learning_rate": "1e-7,1e-2", "seed": "0,1"}
    places: dict[str, Any] = {"dataset": made.dataset_id, "base": str(toy_base), "overrides": {"epochs": 2.0}}
    sweep = new_sweep(settings, method="reward", ranges=ranges, grid=True, scheduler="pbt", **places)
    found = run_sweep(settings, sweep)
    assert [trial.status for trial in found.trials] == ["completed"] * 4
    assert found.axes.names == ("pair accuracy", "calibration error") and found.chosen is not None
    client = tracking.client(settings)
    runs = client.search_runs(
        [client.get_run(found.run_id).info.experiment_id], f"tags.mlflow.parentRunId = '{found.run_id}'"
    )
    history = {
        (run.data.tags["rayloop.trial"], name): [m.value for m in client.get_metric_history(run.info.run_id, name)]
        for run in runs
        for name in ("progress", "score", "pair_accuracy", "rate/learning_rate")
    }
    trials = {trial for trial, _ in history}
    assert len(trials) == 4 and all(len(values) == 2 for values in history.values())
    # a training that had begun anew would be measured at the rung once more
    assert all(history[trial, "progress"] == [0.5, 1.0] for trial in trials)
    adopted = {run.data.tags["rayloop.trial"]: run.data.tags.get("rayloop.adopted") for run in runs}
    better = {trial for trial in trials if adopted[trial] is None}
    assert len(better) == 2 and {adopted[trial] for trial in trials - better} <= better
    at_rung = {trial: history[trial, "score"][0] for trial in trials}
    assert max(at_rung[trial] for trial in trials - better) <= min(at_rung[trial] for trial in better)


@pytest.mark.ray
def test_a_stopped_training_frees_its_actor_within_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune.trial import RunningTrial

    class Endless(RunningTrial):
        def _train(self) -> Any:
            for step in range(1, 100_000):
                time.sleep(0.005)
                self.progress(step, 100_000, {})

    running = Endless(EMPTY, {}, tmp_path / "t")
    running.go_on()
    time.sleep(0.05)
    running.stop()
    assert not running.thread.is_alive() and running.results.empty()


def test_a_training_that_breaks_is_a_failed_trial(tmp_path: Path) -> None:
    from tune.trial import FAILED_SCORE, RunningTrial

    class Broken(RunningTrial):
        def _train(self) -> Any:
            raise ValueError("pairs are swapped")

    running = Broken(EMPTY, {}, tmp_path / "t")
    running.go_on()
    result = running.next()
    assert result["done"] and result["failed"] == "pairs are swapped" and result["score"] == FAILED_SCORE


def test_a_training_waits_at_its_rung_until_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune.objective import Measurement
    from tune.trial import RunningTrial

    reached: list[int] = []

    class Stepping(RunningTrial):
        def _train(self) -> Any:
            self.targets = [2, 4]
            for step in range(1, 6):
                reached.append(step)
                self.progress(step, 5, {})
                self.checkpoint(tmp_path, step)
            raise ValueError("the end")

    monkeypatch.setattr("tune.trial.measured", lambda *_: Measurement(0.5, 0.01))
    running = Stepping(EMPTY, {}, tmp_path / "t")
    for share, steps in ((0.4, [1, 2]), (0.8, [1, 2, 3, 4])):
        running.go_on()
        assert running.next()["progress"] == share and reached == steps
    running.stop()
    assert reached == [1, 2, 3, 4]


def test_rungs_of_halving_grow_and_those_of_a_population_do_not(settings: Settings) -> None:
    sweep = settings.sweep.model_copy(update={"rungs": 3, "reduction": 4.0})
    assert rungs_of(sweep, "asha") == (1 / 16, 1 / 4, 1.0)
    assert rungs_of(sweep, "pbt") == pytest.approx((1 / 3, 2 / 3, 1))
    assert rungs_of(sweep, "none") == (1.0,)


def test_a_sweep_of_a_tenant_that_has_used_up_its_quota_is_refused(settings: Settings, sqlite_database: Engine) -> None:
    limited = settings.model_copy(
        update={"training": settings.training.model_copy(update={"limits": LimitSettings(max_training_hours=1.0)})}
    )
    jobs = Jobs(sqlite_database, "default", "default")
    jobs.create("sft", job_id="long")
    jobs.start("long")
    with sqlite_database.begin() as connection:
        connection.execute(training_jobs.update().values(started_at_us=now_us() - 2 * 3600 * SECOND_US))
    sweep = small_sweep(settings)
    with pytest.raises(ConflictError, match=r"training\.limits\.max_training_hours is 1"), new_job(limited, sweep):
        raise AssertionError("it began")
    assert [job.job_id for job in jobs.list()] == ["long"]
