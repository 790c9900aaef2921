"""A job of the fine-tuning API in this process: what fails is recorded with its reason, and goes on later."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.job_events import read_events
from cluster.jobs import Job, Jobs
from cluster.registry import Registry
from cluster.runners import Runners
from cluster.settings import Settings, load_settings
from data.finetuning.rows import check_file
from data.finetuning.uploads import Uploads
from tests.toys import toy_examples, toy_feedback
from train.finetuning import run_job


@pytest.fixture
def short(mlflow_settings: Settings) -> Settings:
    training = {"threads": 1, "max_length": 256, "batch_size": 20, "gradient_accumulation": 1}
    return load_settings(home=mlflow_settings.home, training=training, finetuning={"use_ray": False})[0]


@pytest.fixture
def database(short: Settings) -> Any:
    engine = connect(short)
    yield engine
    engine.dispose()


def upload(settings: Settings, database: Engine, count: int) -> str:
    uploads = Uploads(database, settings.files_root, "acme", "default")
    with uploads.draft() as (path, file):
        for messages in toy_examples(count):
            file.write(json.dumps({"messages": messages}).encode() + b"\n")
        file.flush()
        checked = check_file(path)
        return uploads.keep(path, "x.jsonl", "fine-tune", format=checked.format, rows=checked.rows).file_id


def submit(settings: Settings, database: Engine, base: object, training_file: str, **change: Any) -> Job:
    request = {
        "model": "base", "base": str(base), "agent": "ft-acme", "served_as": "ft:base:acme::1", "seed": 1,
        "training": "sft", "training_file": training_file, "validation_file": None, "suffix": None,
        "overrides": {"epochs": 1.0, "learning_rate": 5e-3, "seed": 1},
    }  # fmt: skip
    return Jobs(database, "acme", "default").create("sft", agent="ft-acme", request=request | change)


def run(settings: Settings, database: Engine, job: Job, *states: str) -> str:
    token = Runners(database).claim(job.job_id, states or ("pending",))
    assert token is not None
    try:
        return run_job(settings, database, job.job_id, token)
    finally:
        Runners(database).release(job.job_id, token)


def failure(database: Engine, job: Job) -> str:
    found = Jobs(database, "acme", "default").get(job.job_id)
    assert found.state == "failed" and found.error is not None
    said = read_events(database, job.job_id)[-1]
    assert said.level == "error" and found.error in said.message
    return found.error


def test_job_of_another_tenant_trains_and_is_registered_after_a_lost_registration(
    short: Settings, database: Engine, toy_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(short, database, toy_base, upload(short, database, 40))
    with monkeypatch.context() as patch:
        patch.setattr("train.finetuning.register_adapter", _lose_mlflow)
        with pytest.raises(NotFoundError):
            run(short, database, job)
    jobs = Jobs(database, "acme", "default")
    trained = jobs.get(job.job_id)
    assert (trained.state, trained.output_version) == ("completed", None)
    assert trained.dataset_id is not None and trained.dataset_id.startswith("upload-acme-")
    assert run(short, database, job, "completed") == "ft-acme/1"
    assert jobs.get(job.job_id).output_version == "ft-acme/1"
    assert Registry(short).get("ft-acme/1").tags["rayloop.tenant"] == "acme"
    assert any(event.kind == "metrics" for event in read_events(database, job.job_id))


def _lose_mlflow(*_: object, **__: object) -> None:
    raise NotFoundError("no MLflow run")


def test_method_that_is_not_there_fails_the_job(short: Settings, database: Engine, tmp_path: Path) -> None:
    job = submit(short, database, tmp_path, upload(short, database, 10), training="unheard")
    with pytest.raises(InputError):
        run(short, database, job)
    assert "method='unheard' must be one of" in failure(database, job)


def test_deleted_file_and_missing_base_fail_the_job_and_it_can_be_resumed(
    short: Settings, database: Engine, toy_base: Path, tmp_path: Path
) -> None:
    file_id = upload(short, database, 40)
    job = submit(short, database, tmp_path / "nowhere", file_id)
    with pytest.raises(InputError):
        run(short, database, job)
    assert "does not exist" in failure(database, job)
    Uploads(database, short.files_root, "acme", "default").delete(file_id)
    gone = submit(short, database, toy_base, file_id)
    with pytest.raises(NotFoundError):
        run(short, database, gone)
    assert f"training_file '{file_id}' was deleted" in failure(database, gone)
    assert Jobs(database, "acme", "default").resume(gone.job_id).state == "pending"


def test_paused_job_refuses_its_process_and_is_not_marked_failed(
    short: Settings, database: Engine, toy_base: Path
) -> None:
    job = submit(short, database, toy_base, upload(short, database, 20))
    jobs = Jobs(database, "acme", "default")
    token = Runners(database).claim(job.job_id, ("pending",))
    jobs.pause(job.job_id)
    with pytest.raises(ConflictError, match="somebody paused it"):
        run_job(short, database, job.job_id, str(token))
    assert jobs.get(job.job_id).state == "paused"


def upload_pairs(settings: Settings, database: Engine, count: int, seed: int) -> str:
    uploads = Uploads(database, settings.files_root, "acme", "default")
    with uploads.draft() as (path, file):
        for row in toy_feedback(count, seed)["preference"]:
            line = {
                "input": {"messages": json.loads(row["prompt"])},
                "preferred_output": json.loads(row["chosen"]),
                "non_preferred_output": json.loads(row["rejected"]),
            }
            file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        checked = check_file(path)
        return uploads.keep(path, "x.jsonl", "fine-tune", format=checked.format, rows=checked.rows).file_id


def test_dpo_reports_sft_on_the_same_feedback_beside_it(short: Settings, database: Engine, toy_base: Path) -> None:
    validation = upload_pairs(short, database, 12, seed=9)
    job = submit(
        short, database, toy_base, upload_pairs(short, database, 40, seed=1),
        training="dpo", validation_file=validation, overrides={"max_steps": 2, "seed": 1, "learning_rate": 5e-3},
    )  # fmt: skip
    assert run(short, database, job) == "ft-acme/1"
    jobs = Jobs(database, "acme", "default")
    assert jobs.get(job.job_id).state == "completed"
    beside = jobs.get(f"{job.job_id}.sft")
    assert (beside.state, beside.kind, beside.request) == ("completed", "sft", None)
    assert beside.config["learning_rate"] != 5e-3  # its own, not DPO's
    (said,) = [event for event in read_events(database, job.job_id) if event.message.startswith("SFT on the same")]
    assert said.data is not None
    own, other = (said.data[method]["heldout/liked_nats_per_token"] for method in ("dpo", "sft"))
    assert f"nats a token of liked answers {other:.4f} (dpo {own:.4f})" in said.message
    assert [found.job_id for found in jobs.requested()] == [job.job_id]


def test_an_interrupted_job_goes_on_with_the_sft_run_beside_it(
    short: Settings, database: Engine, toy_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(
        short, database, toy_base, upload_pairs(short, database, 40, seed=1),
        training="dpo", overrides={"max_steps": 2, "seed": 1},
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("train.jobs.run_here", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(short, database, job)
    jobs = Jobs(database, "acme", "default")
    assert [jobs.get(name).state for name in (job.job_id, f"{job.job_id}.sft")] == ["failed", "failed"]
    jobs.resume(job.job_id)
    assert run(short, database, job) == "ft-acme/1"
    assert jobs.get(f"{job.job_id}.sft").state == "completed"


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
