"""`rayloop train run` and `rayloop register`, called as a person calls them but in this process."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cluster.database import connect
from cluster.errors import (
    ConflictError,
    DatasetError,
    HealthGateError,
    InputError,
    NotFoundError,
    RayloopError,
    UnavailableError,
)
from cluster.jobs import Jobs
from cluster.registry import Registry
from cluster.settings import Settings, load_settings
from data.log import EventLog
from data.template import template_digest
from tests.toys import toy_feedback, write_dataset
from train.cli import app
from train.config import TrainConfig
from train.jobs import run_training
from train.mailbox import Event
from train.models import load_tokenizer
from train.plan import Request
from train.worker import run_here

WAIT_S = 0.4


@pytest.fixture
def home(mlflow_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an empty MLflow, which the commands find through the environment."""
    monkeypatch.setenv("RAYLOOP_HOME", str(mlflow_settings.home))
    for name, value in {"threads": 1, "max_length": 256, "batch_size": 20, "gradient_accumulation": 1}.items():
        monkeypatch.setenv(f"RAYLOOP_TRAINING__{name.upper()}", str(value))
    return mlflow_settings.home


def call(*arguments: object) -> dict[str, Any]:
    """Run a command that must succeed; what it printed as JSON."""
    outcome = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.stderr
    parsed: dict[str, Any] = json.loads(outcome.stdout)
    return parsed


def refused(kind: type[RayloopError], *arguments: object) -> str:
    """Run a command that must be refused; the one line it prints."""
    with pytest.raises(kind) as caught:
        CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_train_and_register_keep_the_whole_lineage(home: Path, toy_base: Path, toy_dataset: Path) -> None:
    call("register", "triage", "--base", toy_base)
    request = ("--method", "dpo", "--dataset", toy_dataset, "--agent", "triage", "--name", "first")
    trained = call("run", *request, "--max-steps", 3, "--learning-rate", 5e-3, "--no-ray")
    assert [run["method"] for run in trained["runs"]] == ["sft", "dpo"]
    assert trained["method"] == "dpo" and trained["job_id"] == "first.dpo"

    registered = call("register", "triage", trained["adapter_dir"])
    assert registered["version"] == "triage/2"
    settings = load_settings()[0]
    version = Registry(settings).get("triage/2")
    assert version.adapter_sha256 == trained["adapter_sha256"]
    assert (version.dataset_hash, version.run_id) == (trained["dataset_hash"], trained["run_id"])
    assert version.base_model == str(toy_base.resolve())
    canary = Registry(settings).adapter_dir(version) / "canary.json"
    assert version.tags["canary_sha256"] == hashlib.sha256(canary.read_bytes()).hexdigest()

    run = Registry(settings).client.get_run(trained["run_id"])
    assert run.info.status == "FINISHED"
    for tag in ("dataset_hash", "base_revision", "libraries", "seed", "adapter_sha256", "mlflow.source.git.commit"):
        assert run.data.tags.get(tag), tag
    assert run.data.params["beta"] == "0.1"
    assert {"train/loss", "validation/loss", "heldout/pair_accuracy", "system/memory_mb"} <= set(run.data.metrics)

    database = connect(settings)
    job = Jobs(database, settings.tenant, settings.workspace).get("first.dpo")
    assert (job.state, job.output_version, job.agent) == ("completed", "triage/2", "triage")
    updates = [r.event.body["version"] for r in EventLog(database).read() if r.event.kind == "model.updated"]
    assert updates == ["triage/1", "triage/2"]


def test_training_registers_all_its_runs_when_asked(home: Path, toy_base: Path, toy_dataset: Path) -> None:
    request = ("--method", "dpo", "--dataset", toy_dataset, "--base", toy_base, "--register", "triage")
    trained = call("run", *request, "--max-steps", 2, "--learning-rate", 5e-3, "--no-ray")
    assert [run["version"] for run in trained["runs"]] == ["triage/1", "triage/2"]
    assert trained["version"] == "triage/2"
    version = Registry(load_settings()[0]).get("triage/2")
    assert (version.adapter_sha256, version.run_id) == (trained["adapter_sha256"], trained["run_id"])
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    assert version.tags["template_digest"] == template_digest(tokenizer)


def test_reward_model_reports_its_calibration_in_mlflow(home: Path, toy_base: Path, toy_dataset: Path) -> None:
    common = ("--dataset", toy_dataset, "--base", toy_base, "--no-ray", "--max-steps", 3, "--learning-rate", 1e-2)
    trained = call("run", "--method", "reward", "--name", "judge", *common)
    assert [run["method"] for run in trained["runs"]] == ["reward"]  # nothing beside it to compare with
    client = Registry(load_settings()[0]).client
    names = {artifact.path for artifact in client.list_artifacts(trained["run_id"], "report")}
    assert names == {"report/calibration.json", "report/calibration.png"}
    metrics = client.get_run(trained["run_id"]).data.metrics
    assert {"heldout/pair_accuracy", "heldout/calibration_error", "heldout/pair_accuracy_on_correction"} <= set(metrics)
    assert "scores and does not answer" in refused(InputError, "register", "triage", trained["adapter_dir"])


def test_grpo_keeps_its_grader_and_template_with_the_version(home: Path, toy_base: Path, toy_dataset: Path) -> None:
    common = ("--dataset", toy_dataset, "--base", toy_base, "--no-ray", "--max-steps", 2, "--learning-rate", 1e-2)
    trained = call("run", "--method", "grpo", "--name", "graded", "--batch-size", 32, *common)
    registry = Registry(load_settings()[0])
    tags = registry.get(call("register", "triage", trained["adapter_dir"])["version"]).tags
    assert tags["rayloop.grader"].startswith("dataset_label-")
    assert tags["template_digest"] == template_digest(load_tokenizer(str(toy_base)))
    assert {"train/reward", "train/kl", "heldout/reward"} <= set(
        registry.client.get_run(trained["run_id"]).data.metrics
    )


def test_fully_fine_tuned_model_is_registered_as_a_base(home: Path, toy_base: Path, toy_dataset: Path) -> None:
    common = ("--dataset", toy_dataset, "--base", toy_base, "--no-ray", "--max-steps", 2)
    trained = call("run", "--method", "sft", "--weights", "full", "--name", "whole", *common)
    settings = load_settings()[0]
    registry, database = Registry(settings), connect(settings)
    assert not registry.client.list_artifacts(trained["run_id"], "adapter")  # no weights travel
    version = registry.get(call("register", "triage", "--base", trained["adapter_dir"])["version"])
    assert version.tags["base_revision"] == f"sha256:{trained['adapter_sha256']}"
    assert (version.dataset_hash, version.run_id) == (trained["dataset_hash"], trained["run_id"])
    assert version.tags["template_digest"] == template_digest(load_tokenizer(str(toy_base)))
    assert version.trained and version.trained_behind == "" and version.aliases == ()  # no champion before its gates
    assert Jobs(database, settings.tenant, settings.workspace).get("whole").output_version == version.id
    plain = registry.get(call("register", "other", "--base", toy_base)["version"])
    assert not plain.trained and plain.trained_behind is None and plain.aliases == ("champion",)


def test_interrupted_training_is_resumed_by_name(home: Path, toy_base: Path, toy_dataset: Path) -> None:
    settings = load_settings(home=home, training={"save_steps": 2})[0]
    database = connect(settings)
    shape = {"max_steps": 5, "learning_rate": 5e-3}
    request = Request(("sft",), str(toy_dataset), base=str(toy_base), name="cut", ray=False, overrides=shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.worker._Local.checkpoint", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_training(settings, request, database)
    jobs = Jobs(database, settings.tenant, settings.workspace)
    assert jobs.get("cut").state == "failed"

    resumed = call("run", "--resume", "cut", "--no-ray")
    whole = run_training(settings, Request(**{**vars(request), "name": "whole"}), database)
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert jobs.get("cut").retries == 1
    assert "is completed" in refused(ConflictError, "run", "--resume", "cut", "--no-ray")


def test_lost_workers_are_started_again_with_a_pause(
    home: Path, toy_base: Path, toy_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(home=home, training={"job_retries": 2, "retry_backoff_s": 0.5})[0]
    waits: list[float] = []
    monkeypatch.setattr("train.jobs.time.sleep", waits.append)
    real, losses = run_here, iter([True, True, False])

    def lose(configs: Sequence[TrainConfig], on_event: Callable[[Event], None]) -> None:
        if next(losses):
            on_event(Event(0, "begin"))
            raise UnavailableError("training workers failed: node lost")
        real(configs, on_event)

    monkeypatch.setattr("train.jobs.run_here", lose)
    shape = {"max_steps": 2, "learning_rate": 5e-3}
    request = Request(("sft",), str(toy_dataset), base=str(toy_base), name="lost", ray=False, overrides=shape)
    assert run_training(settings, request, connect(settings))["steps"] == 2
    job = Jobs(connect(settings), settings.tenant, settings.workspace).get("lost")
    assert (job.state, job.retries, waits) == ("completed", 2, [0.5, 1.0])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_training_that_says_nothing_for_long_is_not_lost(
    home: Path, toy_base: Path, toy_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(home=home, training={"job_silent_s": WAIT_S})[0]
    database = connect(settings)
    jobs, lost, real = Jobs(database, settings.tenant, settings.workspace), [], run_here

    def load_slowly(configs: Sequence[TrainConfig], on_event: Callable[[Event], None]) -> None:
        on_event(Event(0, "begin"))
        time.sleep(2 * WAIT_S)
        lost.extend(jobs.fail_lost(WAIT_S))
        real(configs, on_event)

    monkeypatch.setattr("train.jobs.run_here", load_slowly)
    shape = {"max_steps": 1, "learning_rate": 5e-3, "report_examples": 0}
    request = Request(("sft",), str(toy_dataset), base=str(toy_base), name="slow", ray=False, overrides=shape)
    assert run_training(settings, request, database)["steps"] == 1
    assert lost == [] and jobs.get("slow").state == "completed"


def test_closed_gate_fails_job_and_run_with_the_reason(home: Path, toy_base: Path, tmp_path: Path) -> None:
    rows = toy_feedback(40)
    rows["preference"] = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows["preference"]]
    folder = write_dataset(tmp_path / "swapped", rows)
    common = ("run", "--method", "dpo", "--dataset", folder, "--base", toy_base, "--no-ray", "--no-baseline")
    assert "pairs are swapped" in refused(HealthGateError, *common, "--name", "bad")
    settings = load_settings()[0]
    job = Jobs(connect(settings), settings.tenant, settings.workspace).get("bad")
    assert job.state == "failed" and job.error is not None and "swapped" in job.error
    assert not (home / "training" / "bad").exists()


def test_one_closed_gate_among_several_methods_is_told_and_the_others_kept(
    home: Path, toy_base: Path, tmp_path: Path
) -> None:
    rows = toy_feedback(40)
    rows["preference"] = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows["preference"]]
    folder = write_dataset(tmp_path / "swapped", rows)
    methods = ("--method", "dpo", "--method", "sft")
    result = call("run", *methods, "--dataset", folder, "--base", toy_base, "--no-ray", "--max-steps", 2)
    assert [run["method"] for run in result["runs"]] == ["sft"]
    (failed,) = result["failed"]
    assert failed["method"] == "dpo" and failed["gate"] and "swapped" in failed["error"]


def test_bad_input_is_one_line_and_leaves_nothing(
    home: Path, toy_base: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    common = ("run", "--no-ray", "--no-baseline", "--dataset", toy_dataset)
    assert "does not exist" in refused(InputError, *common, "--base", tmp_path / "nowhere")
    assert "must be one of sft, dpo, kto, reward, score_card, grpo" in refused(
        InputError, *common, "--base", toy_base, "--method", "ppo"
    )
    assert "train.beta=-1.0" in refused(InputError, *common, "--base", toy_base, "--beta", -1)
    assert "train.seed=4294967296" in refused(InputError, *common, "--base", toy_base, "--seed", 2**32)
    assert "names 0 datasets" in refused(NotFoundError, "run", "--dataset", "nothing", "--base", toy_base)
    assert "has no GPU here" in refused(InputError, *common, "--base", toy_base, "--device", "cuda")
    assert "needs a GPU" in refused(InputError, *common, "--base", toy_base, "--weights", "qlora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLOOP_TRAINING__LORA__R", "512")
        assert "is over engine.max_rank" in refused(InputError, *common, "--base", toy_base)
    register = (*common, "--base", toy_base, "--register")
    assert "model='my agent' must be letters" in refused(InputError, *register, "my agent")
    assert "reward makes one that scores" in refused(InputError, *register, "triage", "--method", "reward")
    for name in ("../elsewhere", "a/b", ".", "x" * 49):
        assert f"name={name!r} must be" in refused(InputError, *common, "--base", toy_base, f"--name={name}")
    many = ("run", "--dataset", toy_dataset, "--base", toy_base, "--workers", 7)
    assert "training.workers=7 is more than the cluster started here holds" in refused(InputError, *many)
    empty = write_dataset(tmp_path / "empty", {"sft": [], "preference": [], "unpaired": []})
    assert "no sft examples" in refused(
        DatasetError, "run", "--method", "sft", "--dataset", empty, "--base", toy_base, "--no-ray"
    )
    assert not (home / "training").exists()


def test_adapter_of_unknown_origin_needs_its_base(home: Path, toy_base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    assert "name it with --base-model" in refused(InputError, "register", "triage", adapter)
    assert call("register", "triage", adapter, "--base-model", toy_base)["version"] == "triage/1"
    assert "one of the two" in refused(InputError, "register", "triage")


def test_what_costs_too_much_is_refused_before_anything_starts(
    home: Path, toy_base: Path, toy_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("run", "--method", "sft", "--dataset", toy_dataset, "--base", toy_base, "--name", "dear")
    monkeypatch.setenv("RAYLOOP_TRAINING__LIMITS__MAX_STEPS", "5")
    assert "means 18 steps, more than training.limits.max_steps=5" in refused(InputError, *common)
    monkeypatch.delenv("RAYLOOP_TRAINING__LIMITS__MAX_STEPS")
    settings = load_settings()[0]
    database = connect(settings)
    jobs = Jobs(database, settings.tenant, settings.workspace)
    jobs.create("sft", job_id="dear")
    jobs.fail("dear", "killed")
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE training_jobs SET used_gpu_s = 3600 * 500"))
    for arguments in (common[:-2], ("run", "--resume", "dear")):
        assert "trained for 500.0 GPU-hours" in refused(ConflictError, *arguments)
    database.dispose()


def test_too_many_jobs_are_refused(home: Path, toy_base: Path, toy_dataset: Path) -> None:
    settings = load_settings()[0]
    jobs = Jobs(connect(settings), settings.tenant, settings.workspace)
    for _ in range(settings.training.limits.max_concurrent_jobs):
        jobs.start(jobs.create("sft").job_id)
    common = ("run", "--method", "sft", "--dataset", toy_dataset, "--base", toy_base, "--no-ray")
    assert "max_concurrent_jobs" in refused(ConflictError, *common)
    with connect(settings).connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM training_jobs")).scalar() == 4
