"""A training or a sweep that is ended early says how it goes on, and its row says at once what became of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.jobs import Job, Jobs
from cluster.settings import Settings, load_settings
from tests.datasets import write_feedback_dataset
from tune.job import new_job
from tune.spec import new_sweep

LINES = {signal.SIGTERM: (143, "terminated"), signal.SIGINT: (130, "interrupted")}


def begin(config: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", *arguments, "--config", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip


def once_running(jobs: Jobs, job_id: str, process: "subprocess.Popen[str]") -> Job:
    """The job once its workers are at it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = [job for job in jobs.list() if job.job_id == job_id and (job.progress or {}).get("step")]
        if found:
            return found[0]
        time.sleep(0.2)
    process.kill()
    raise AssertionError(f"{job_id} did not begin: {process.communicate()}")


@pytest.mark.ray
@pytest.mark.parametrize("number", list(LINES))
def test_an_interrupted_training_ends_with_one_line_and_its_row_is_true(
    number: signal.Signals, mlflow_settings: Settings, toy_base: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    config = tmp_path / "rayloop.yaml"
    training = {"base_model": str(toy_base), "threads": 1, "max_length": 256, "batch_size": 8, "report_examples": 0}
    config.write_text(yaml.safe_dump({"home": str(mlflow_settings.home), "training": training}))
    jobs = Jobs(connect(load_settings(config)[0]), "default", "default")
    process = begin(config, "train", "run", "--method", "sft", "--dataset", str(toy_dataset), "--name", "long",
                    "--epochs", "50", "--gradient-accumulation", "1")  # fmt: skip
    once_running(jobs, "long", process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    code, word = LINES[number]
    assert process.returncode == code, said
    assert said.splitlines()[-1] == f"{word}; go on with: rayloop train run --resume long"
    assert "Traceback" not in said and "SIGTERM received" not in said, said
    job = jobs.get("long")
    assert (job.state, job.error) == ("failed", "the command ended before the run; go on with --resume")


def test_a_terminated_sweep_leaves_a_failed_row_that_says_how_to_go_on(
    settings: Settings, sqlite_database: Engine
) -> None:
    made = write_feedback_dataset(settings.home / "datasets", users=10)
    sweep = new_sweep(settings, method="dpo", dataset=str(settings.home / "datasets" / made.dataset_id), base="b")
    with pytest.raises(SystemExit), new_job(settings, sweep):
        raise SystemExit(143)
    job = Jobs(sqlite_database, "default", "default").get(sweep.sweep_id)
    assert (job.state, job.error) == ("failed", "the command ended before the sweep; go on with --resume")
