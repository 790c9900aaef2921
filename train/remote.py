"""A training done by another endpoint that speaks OpenAI's fine-tuning API: a cluster of ours, or a hosted one.

The dataset is sent as a file of lines, the job is watched to its end, what it measured goes to MLflow, and the
model it names becomes a version. What has happened stands in the job table, so watching can go on elsewhere.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from sqlalchemy.engine import Engine

from cluster import tracking
from cluster.clock import DAY_US, now_us
from cluster.errors import ConflictError, DatasetError, InputError, RayloopError, UnavailableError
from cluster.job_events import note
from cluster.jobs import REMOTE, Job, Jobs
from cluster.registry import Registry, check_model_name
from cluster.settings import Settings
from data.manifest import Manifest, find_dataset, load_manifest, read_examples
from train.config import TrainedPrompt
from train.draw import drawn
from train.examples import behind
from train.plan import load_whole
from train.progress import Progress
from train.prompts import trained_prompt
from train.register import append_update

log = logging.getLogger(__name__)

METHODS = {"sft": ("supervised", "sft"), "dpo": ("dpo", "preference")}
"""Our method -> the API's word for it, and the kind of examples it needs."""
ENDED = ("succeeded", "failed", "cancelled")
MB = 2**20
SEED = 0  # of the rows drawn: a dataset sent again is the same file


@dataclass(frozen=True)
class RemoteRequest:
    """What is to be trained where."""

    model: str
    agent: str
    method: str = "sft"
    dataset: str = "latest"
    base_url: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    suffix: str | None = None
    resume: str | None = None
    """Job that was sent earlier; nothing is sent again."""


def train_remotely(
    settings: Settings, database: Engine, request: RemoteRequest, client: openai.OpenAI | None = None
) -> dict[str, Any]:
    """Send, watch and register; what the command prints.

    Raises:
        InputError: no address, an unknown method, no name for an agent, a dataset over the quota.
        ConflictError: the tenant has sent as many trainings today as it may.
        RayloopError: the job failed or was cancelled there, with its reason.
    """
    jobs = Jobs(database, settings.tenant, settings.workspace)
    used = client or _client(settings, request)
    job = _again(jobs, request.resume) if request.resume else _send(settings, jobs, request, used)
    asked = dict(job.config)
    manifest = load_manifest(find_dataset(settings, asked["dataset"]))
    try:
        with tracking.run(settings, job.job_id, tags=_tags(job, manifest)) as run:
            remote = _watch(settings, jobs, job, used, run)
            version = Registry(settings).register_remote(
                asked["agent"],
                str(remote.fine_tuned_model),
                endpoint=asked["base_url"],
                run_id=run.run_id,
                dataset_hash=manifest.dataset_hash,
                dataset_id=manifest.dataset_id,
                lineage={
                    "rayloop.job_id": job.job_id,
                    "rayloop.method": asked["method"],
                    "prompt_digest": asked.get("prompt_digest", ""),
                },
            )
    except RayloopError as error:
        if jobs.get(job.job_id).state == "running":
            jobs.fail(job.job_id, str(error))
        raise
    append_update(settings, database, version, "registered")
    jobs.finish(job.job_id, output_version=version.id)
    return {"job_id": job.job_id, "version": version.id, "remote_model": version.base_model, "run_id": run.run_id}


def _client(settings: Settings, request: RemoteRequest) -> openai.OpenAI:
    if request.base_url is None:
        rule = "must name the endpoint"
        raise InputError("finetuning.remote.base_url", None, rule, "set it in rayloop.yaml or give --base-url")
    name = settings.finetuning.remote.api_key_env
    key = os.environ.get(name)
    if not key:
        raise InputError(name, key, "must hold the endpoint's key", "set the environment variable")
    return openai.OpenAI(base_url=request.base_url, api_key=key)


def _again(jobs: Jobs, job_id: str) -> Job:
    job = jobs.get(job_id)
    if job.kind != REMOTE or "remote_job" not in job.config:
        raise ConflictError(f"job {job_id!r} was not sent to another endpoint; there is nothing to watch")
    if job.state in ("failed", "running"):
        jobs.retry(job_id)
    return jobs.start(job_id)


def _send(settings: Settings, jobs: Jobs, request: RemoteRequest, client: openai.OpenAI) -> Job:
    """Check the quotas, upload the files and create the job there; an attempt that fails counts too."""
    check_model_name(request.agent)
    if request.method not in METHODS:
        raise InputError("method", request.method, f"must be one of {', '.join(METHODS)}", "choose one of them")
    quota = settings.finetuning.remote
    sent = jobs.count_since(REMOTE, now_us() - DAY_US)
    if sent >= quota.max_jobs_per_day:
        raise ConflictError(
            f"tenant {jobs.tenant!r} has sent {sent} trainings within 24 hours and "
            f"finetuning.remote.max_jobs_per_day is {quota.max_jobs_per_day}"
        )
    dataset = find_dataset(settings, request.dataset, agent=request.agent)
    manifest = load_whole(dataset)
    _check_size(manifest, METHODS[request.method][1], settings)
    prompt = trained_prompt(jobs.engine, jobs.tenant, request.agent, manifest)
    config = {
        "prompt_digest": prompt.digest if prompt else "",
        "dataset": str(dataset),
        "agent": request.agent,
        "method": request.method,
        "model": request.model,
        "base_url": str(client.base_url),
    }
    job = jobs.create(REMOTE, agent=request.agent, dataset_id=manifest.dataset_id, config=config)
    try:
        remote_id = _create_there(client, request, dataset, prompt, quota.max_mb)
    except RayloopError as error:
        jobs.fail(job.job_id, str(error))
        raise
    sent_config = {**config, "remote_job": remote_id}
    jobs.adopt(job.job_id, agent=request.agent, dataset_id=manifest.dataset_id, config=sent_config)
    note(jobs.engine, job.job_id, f"Sent to {client.base_url} as {remote_id}")
    return jobs.start(job.job_id)


def _create_there(
    client: openai.OpenAI, request: RemoteRequest, dataset: Path, prompt: TrainedPrompt | None, max_mb: float
) -> str:
    """Upload and create; the job's id there."""
    word, kind = METHODS[request.method]
    with tempfile.TemporaryDirectory() as folder:
        files = {
            split: _write_lines(Path(folder) / f"{split}.jsonl", as_lines(dataset, kind, split, prompt))
            for split in ("train", "validation")
        }
        size_mb = sum(file.stat().st_size for file in files.values() if file) / MB
        if size_mb > max_mb:
            rule = f"has {size_mb:.1f} MB, more than finetuning.remote.max_mb={max_mb:g}"
            raise InputError("dataset", dataset.name, rule, "send less or raise the quota")
        try:
            ids = {split: _upload(client, file) for split, file in files.items()}
            method: Any = {"type": word, word: {"hyperparameters": dict(request.hyperparameters)}}
            created = client.fine_tuning.jobs.create(
                model=request.model,
                training_file=str(ids["train"]),
                validation_file=ids["validation"],
                suffix=request.suffix,
                method=method,
            )
        except openai.OpenAIError as error:
            raise _refused(error) from None
    return str(created.id)


def _check_size(manifest: Manifest, kind: str, settings: Settings) -> None:
    examples, most = manifest.total(kind), settings.finetuning.remote.max_examples
    if not manifest.counts.get(kind, {}).get("train"):
        raise DatasetError(f"dataset {manifest.dataset_id!r} has no {kind} examples to train on")
    if examples > most:
        rule = f"has {examples} {kind} examples, more than finetuning.remote.max_examples={most}"
        raise InputError("dataset", manifest.dataset_id, rule, "send less or raise the quota")


def _write_lines(file: Path, examples: Iterable[dict[str, Any]]) -> Path | None:
    """The examples of a split as lines; `None` where it has none."""
    lines = [json.dumps(line, ensure_ascii=False) for line in examples]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file if lines else None


def as_lines(dataset: Path, kind: str, split: str, prompt: TrainedPrompt | None = None) -> Iterator[dict[str, Any]]:
    """Examples in the format of OpenAI's files, `chat` for `sft`, `preference` pairs, behind the agent's prompt of now;
    train drawn by weight."""
    table = read_examples(dataset, kind, split)
    table = table if prompt is None else behind(table, prompt)
    for row in (drawn(table, SEED) if split == "train" else table).to_pylist():
        tools = {"tools": json.loads(row["tools"])} if row["tools"] else {}
        if kind == "sft":
            *before, answer = json.loads(row["messages"])
            earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in before]
            yield {"messages": [*earlier, answer], **tools}
        else:
            yield {
                "input": {"messages": json.loads(row["prompt"]), **tools},
                "preferred_output": json.loads(row["chosen"]),
                "non_preferred_output": json.loads(row["rejected"]),
            }


def _upload(client: openai.OpenAI, file: Path | None) -> str | None:
    if file is None:
        return None
    with file.open("rb") as content:
        return client.files.create(file=(file.name, content), purpose="fine-tune").id


def _watch(settings: Settings, jobs: Jobs, job: Job, client: openai.OpenAI, run: tracking.Run) -> Any:
    """Follow the job to its end; what it measures goes to MLflow, what it says to the job's events."""
    remote_id, quota = job.config["remote_job"], settings.finetuning.remote
    deadline, seen = time.monotonic() + quota.timeout_s, set[str]()
    remote: Any = None
    with Progress(f"{job.job_id} at {client.base_url}", 0) as bar:
        while True:
            try:
                remote = client.fine_tuning.jobs.retrieve(remote_id)
                _take_events(jobs, job, client, run, seen, bar)
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                log.warning("the endpoint does not answer (%s); asking again", error)
            except openai.OpenAIError as error:
                raise _refused(error) from None
            else:
                if remote.status in ENDED:
                    break
            if time.monotonic() > deadline:
                client.fine_tuning.jobs.cancel(remote_id)
                raise RayloopError(f"remote job {remote_id} took longer than {quota.timeout_s:g} s and was cancelled")
            jobs.progress(job.job_id, {"remote_status": remote and remote.status})
            time.sleep(quota.poll_s)
    if remote.status != "succeeded":
        reason = remote.error.message if remote.error is not None else "no reason was given"
        raise RayloopError(f"remote job {remote_id} ended as {remote.status}: {reason}")
    return remote


def _take_events(jobs: Jobs, job: Job, client: openai.OpenAI, run: tracking.Run, seen: set[str], bar: Progress) -> None:
    """Events that were not seen yet, in their order."""
    fresh = []
    for event in client.fine_tuning.jobs.list_events(job.config["remote_job"], limit=100):
        if event.id in seen:
            break
        fresh.append(event)
    for event in reversed(fresh):
        seen.add(event.id)
        note(jobs.engine, job.job_id, event.message, level=event.level)
        data = event.data if isinstance(event.data, dict) else {}
        numbers = {k: float(v) for k, v in data.items() if isinstance(v, int | float) and k != "step"}
        if event.type == "metrics" and numbers and "step" in data:
            run.log_metrics({f"remote/{name}": value for name, value in numbers.items()}, int(data["step"]))
            bar.steps = int(data.get("total_steps") or data.get("steps") or 0)
            bar.reached(int(data["step"]), None, {k: v for k, v in numbers.items() if "loss" in k})


def _tags(job: Job, manifest: Manifest) -> dict[str, str]:
    return {
        "rayloop.kind": "train",
        "rayloop.method": job.config["method"],
        "rayloop.job_id": job.job_id,
        "rayloop.endpoint": job.config["base_url"],
        "rayloop.remote_job": job.config["remote_job"],
        "dataset_id": manifest.dataset_id,
        "dataset_hash": manifest.dataset_hash,
        "base_model": job.config["model"],
    }


def _refused(error: openai.OpenAIError) -> RayloopError:
    """The endpoint's own words."""
    if isinstance(error, openai.APIConnectionError):
        return UnavailableError(f"the endpoint does not answer ({error.__cause__ or error})")
    if isinstance(error, openai.APIStatusError):
        return RayloopError(f"the endpoint refused it: {error.message}")
    return RayloopError(f"the endpoint's answer cannot be used: {error}")
