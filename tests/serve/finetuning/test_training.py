"""The official client against the real router, engine and trainings, each in a process of its own."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob

from cluster.database import connect
from cluster.errors import ConflictError, InputError, RayloopError
from cluster.job_events import read_events
from cluster.jobs import Jobs
from cluster.registry import Registry
from cluster.runners import Runners
from cluster.settings import load_settings
from cluster.settings.finetuning import FinetuningSettings, RemoteSettings
from data.manifest import load_manifest
from serve.engines.http_api import EngineApi
from serve.engines.local import LocalEngine
from serve.engines.reconciler import Reconciler
from serve.finetuning.dispatcher import DispatchLoop
from tests.serve.finetuning.conftest import Api, chat_rows, item_rows, live_api, pair_rows
from tests.serve.upstream import Server
from tests.toys import toy_feedback, write_dataset
from train.remote import RemoteRequest, train_remotely

WITHIN_S = 240.0
SHOWN_EVERY = 4  # steps from one shown measurement to the next in a run of 450 steps
QUICK = {"poll_interval_s": 0.1, "heartbeat_s": 0.2, "live_after_s": 3.0}


@pytest.fixture(scope="module")
def trainer(toy_base: Path, empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Router, engine and dispatcher around the toy base."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(empty_mlflow, home / "mlflow.db")
    settings, _ = load_settings(
        home=home,
        engine={"base_model": str(toy_base), "torch_threads": 1, **QUICK},
        training={
            "threads": 1,
            "max_length": 256,
            "batch_size": 8,
            "save_steps": 5,
            "gradient_accumulation": 1,
            "grpo": {"max_completion_tokens": 32},
        },
        serve={"poll_ms": 50},
        finetuning={"use_ray": False, "tick_s": 0.2},
    )
    engine = LocalEngine(settings.engine)
    with Server(EngineApi(engine), "on") as engine_url:
        for api in live_api(settings, engine_url):
            reconciler, loop = Reconciler(engine, api.database, "test"), DispatchLoop(settings)
            reconciler.start()
            loop.start()
            yield api
            loop.stop()
            reconciler.close()
    engine.close()


def wait(api: Api, job_id: str, reached: Callable[[FineTuningJob], bool]) -> FineTuningJob:
    deadline = time.monotonic() + WITHIN_S
    while True:
        job = api.client.fine_tuning.jobs.retrieve(job_id)
        if reached(job):
            return job
        assert job.status != "failed", job.error
        log = api.settings.home / "finetuning" / job_id / "log"
        assert time.monotonic() < deadline, (job, log.read_text() if log.exists() else "")
        time.sleep(0.1)


def process_of(api: Api, job_id: str) -> psutil.Process:
    runner = Runners(api.database).find(job_id).runner
    assert runner is not None
    return psutil.Process(runner["pid"])


def step_of(api: Api, job_id: str) -> int:
    return int((Jobs(api.database, "default", "default").get(job_id).progress or {}).get("step", 0))


@pytest.mark.slow
def test_supervised_job_ends_in_a_model_that_chats(trainer: Api, toy_base: Path) -> None:
    client, settings = trainer.client, trainer.settings
    distinct = list({row["messages"][0]["content"]: row for row in chat_rows(400, 1)}.values())
    training, validation = trainer.upload(distinct[:80]), trainer.upload(distinct[80:100])
    job = client.fine_tuning.jobs.create(
        model=toy_base.name,
        training_file=training,
        validation_file=validation,
        suffix="first",
        seed=7,
        metadata={"team": "ops"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 10}},
        },
    )
    assert (job.status, job.model, job.seed, job.metadata) == ("validating_files", "base", 7, {"team": "ops"})
    streamed: list[str] = []
    follow = threading.Thread(target=follow_events, args=(trainer, job.id, streamed))
    follow.start()
    done = wait(trainer, job.id, lambda job: job.status == "succeeded")
    follow.join(timeout=30)
    assert done.fine_tuned_model == f"ft:base:default:first:{job.id.removeprefix('ftjob-')[:8]}"
    assert done.finished_at is not None and done.trained_tokens and done.error is None
    assert streamed[-1] == "[DONE]" and len(streamed) > 10

    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "service=api level=low hour=3"}]
    )
    assert answer.choices[0].message.content
    version = Registry(settings).get("ft-default/1")
    assert answer.model == version.id
    assert version.tags["rayloop.fine_tuned_model"] == done.fine_tuned_model
    assert version.tags["rayloop.job_id"] == job.id and version.dataset_hash
    with pytest.raises(openai.NotFoundError):
        trainer.client_of("rival", ("chat",)).chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "?"}]
        )

    assert done.fine_tuned_model in {model.id for model in client.models.list()}
    assert client.models.retrieve(done.fine_tuned_model).owned_by == "default"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))  # the client follows the cursor
    assert len({event.id for event in events}) == len(events) == len(streamed) - 1
    assert "succeeded" in events[0].message and "Created" in events[-1].message
    losses = [event.data["loss"] for event in events if event.type == "metrics" and "loss" in event.data]  # type: ignore[index,operator]
    assert len(losses) == 10
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [5]
    (result,) = done.result_files
    curve = client.files.content(result).text.splitlines()
    assert curve[0].startswith("step,train_loss") and len(curve) >= 11
    assert client.models.delete(done.fine_tuned_model).deleted
    trainer.app.watcher.refresh()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve(done.fine_tuned_model)


SIMILAR = {
    "type": "text_similarity",
    "name": "near",
    "evaluation_metric": "fuzzy_match",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
}


@pytest.mark.slow
def test_dpo_and_reinforcement_jobs_end_in_models_that_chat(trainer: Api, toy_base: Path) -> None:
    client, rate = trainer.client, {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 10}
    dpo = {"type": "dpo", "dpo": {"hyperparameters": {**rate, "beta": 0.2}}}
    learned = {"hyperparameters": {**rate, "compute_multiplier": 0.5, "eval_interval": 2}, "grader": SIMILAR}
    pairs = trainer.upload(pair_rows(24, 5))
    tasks = trainer.upload(item_rows(24, 6))
    made = [
        client.fine_tuning.jobs.create(model=toy_base.name, training_file=pairs, method=dpo, seed=3),  # type: ignore[arg-type]
        client.fine_tuning.jobs.create(
            model=toy_base.name,
            training_file=tasks,
            validation_file=trainer.upload(item_rows(10, 7)),
            method={"type": "reinforcement", "reinforcement": learned},  # type: ignore[typeddict-item]
            seed=3,
        ),
    ]
    for job in made:
        done = wait(trainer, job.id, lambda job: job.status == "succeeded")
        assert done.fine_tuned_model is not None
        answer = client.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "service=api level=low hour=3"}]
        )
        assert answer.choices[0].message.content
    trained = Jobs(trainer.database, "default", "default").get(made[1].id)
    assert (trained.config["group_size"], trained.config["prompts"]) == (4, "tasks")
    version = Registry(trainer.settings).get(str(trained.output_version))
    measured = Registry(trainer.settings).client.get_run(str(version.run_id)).data.metrics
    assert measured["heldout/reward"] > 0 and measured["validation/reward"] > 0


def follow_events(api: Api, job_id: str, into: list[str]) -> None:
    headers = {"authorization": f"Bearer {api.client.api_key}"}
    url = f"{api.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    with httpx.stream("GET", url, headers=headers, timeout=WITHIN_S) as response:
        into += [line.removeprefix("data: ") for line in response.iter_lines() if line]


def steps_since_resumed(api: Api, job_id: str) -> list[int]:
    events = read_events(api.database, job_id, limit=10_000)
    resumed = max((event.number for event in events if event.message == "The job goes on"), default=10_000)
    return [event.data["step"] for event in events if event.number > resumed and event.kind == "metrics" and event.data]


@pytest.mark.slow
def test_job_is_paused_killed_resumed_and_cancelled_with_its_process(trainer: Api, toy_base: Path) -> None:
    client, jobs = trainer.client, trainer.client.fine_tuning.jobs
    epochs = {"n_epochs": 90, "batch_size": 8, "learning_rate_multiplier": 1, "beta": 0.2}
    job = jobs.create(
        model=toy_base.name,
        training_file=trainer.upload(pair_rows(40, 3)),
        method={"type": "dpo", "dpo": {"hyperparameters": epochs}},  # type: ignore[typeddict-item]
    )
    wait(trainer, job.id, lambda job: step_of(trainer, job.id) > 6)
    first = process_of(trainer, job.id)
    assert jobs.pause(job.id).status == "paused"
    first.wait(30)
    assert jobs.retrieve(job.id).status == "paused"

    assert jobs.resume(job.id).status in ("queued", "running")
    wait(trainer, job.id, lambda job: bool(steps_since_resumed(trainer, job.id)))
    first_step = steps_since_resumed(trainer, job.id)[0]
    checkpoints = [checkpoint.step_number for checkpoint in jobs.checkpoints.list(job.id)]
    resumed_at = max(step for step in checkpoints if step < first_step)  # none where it began anew
    assert first_step - resumed_at <= SHOWN_EVERY
    second = process_of(trainer, job.id)
    assert second.pid != first.pid
    os.kill(second.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (failed := jobs.retrieve(job.id)).status != "failed" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert failed.error is not None and "ended without a word" in failed.error.message

    jobs.resume(job.id)
    wait(trainer, job.id, lambda job: Runners(trainer.database).find(job.id).runner is not None)
    assert jobs.cancel(job.id).status == "cancelled"
    deadline = time.monotonic() + 60
    while Runners(trainer.database).find(job.id).runner is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert Runners(trainer.database).find(job.id).runner is None
    assert not (trainer.settings.home / "training" / job.id).exists()
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        jobs.resume(job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None


@pytest.mark.slow
def test_dataset_is_trained_by_a_remote_endpoint_and_registered(
    trainer: Api, toy_base: Path, toy_feedback_dataset: Path, empty_mlflow: Path, tmp_path: Path
) -> None:
    remote = {"poll_s": 0.2, "max_jobs_per_day": 1}
    settings, _ = load_settings(home=tmp_path / "here", finetuning={"remote": remote})
    settings.home.mkdir()
    shutil.copy(empty_mlflow, settings.home / "mlflow.db")
    database = connect(settings)
    request = RemoteRequest(
        model=toy_base.name, agent="triage", method="dpo", dataset=str(toy_feedback_dataset),
        hyperparameters={"n_epochs": 1}, suffix="far",
    )  # fmt: skip
    done = train_remotely(settings, database, request, trainer.client)
    assert done["remote_model"].startswith("ft:base:default:far:")
    version = Registry(settings).get("triage/1")
    assert (version.base_model, version.adapter_sha256) == (done["remote_model"], None)
    assert version.dataset_hash == load_manifest(toy_feedback_dataset).dataset_hash
    measured = Registry(settings).client.get_run(done["run_id"]).data.metrics
    assert measured["remote/loss"] > 0
    job = Jobs(database, "default", "default").get(done["job_id"])
    assert (job.state, job.output_version) == ("completed", "triage/1")
    with pytest.raises(ConflictError, match="max_jobs_per_day is 1"):
        train_remotely(settings, database, request, trainer.client)
    refused = replace(request, dataset=str(toy_feedback_dataset), model="unknown")
    more = settings.model_copy(update={"finetuning": FinetuningSettings()})
    with pytest.raises(RayloopError, match=r"the endpoint refused it: .*'unknown' does not exist"):
        train_remotely(more, database, refused, trainer.client)
    small = FinetuningSettings(remote=RemoteSettings(max_examples=10))
    with pytest.raises(InputError, match=r"more than finetuning\.remote\.max_examples=10"):
        train_remotely(settings.model_copy(update={"finetuning": small}), database, request, trainer.client)
    database.dispose()


@pytest.fixture(scope="module")
def toy_feedback_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "feedback", toy_feedback(60, seed=3))
