"""One job of the fine-tuning API, from its files to a registered version, in a process of its own.

Which job, for whom and with what stands in the job table; so does how far it is. A process that was paused or
killed is started again and goes on: with the dataset it had made, from the last checkpoint, or with the
registration that was missing.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, NotFoundError, RayloopError
from cluster.job_events import note
from cluster.jobs import Job, Jobs
from cluster.registry import Registry
from cluster.runners import Runners
from cluster.settings import Settings
from data.finetuning.dataset import Part, package
from data.finetuning.uploads import Uploads
from data.manifest import datasets_root, load_manifest
from train.config import TrainConfig, resolve_config
from train.jobs import run_training
from train.plan import Request
from train.register import register_adapter

log = logging.getLogger(__name__)

SERVED_AS_TAG = "rayloop.fine_tuned_model"


def run_job(settings: Settings, database: Engine, job_id: str, token: str) -> str:
    """Do the job this process was given; the version its result was registered as.

    Raises:
        ConflictError: the job is another process's, or was paused or cancelled.
        RayloopError: the job failed; its row says why.
    """
    Runners(database).report(job_id, token)
    job = Runners(database).find(job_id)
    settings = settings.model_copy(update={"tenant": job.tenant, "workspace": job.workspace})
    jobs = Jobs(database, job.tenant, job.workspace)
    try:
        if job.state != "completed":
            _train(settings, jobs, job)
        return _register(settings, database, jobs.get(job_id))
    except BaseException as error:
        _settle(jobs, job_id, error)
        raise


def _train(settings: Settings, jobs: Jobs, job: Job) -> None:
    asked = _asked(job)
    resolve_config(settings, asked["training"], base_model="", dataset=Path(), out=Path(), **asked["overrides"])
    if job.dataset_id is None:
        note(jobs.engine, job.job_id, "Validating files")
        job = _package(settings, jobs, job)
    place = datasets_root(settings) / str(job.dataset_id)
    note(jobs.engine, job.job_id, f"Training on dataset {job.dataset_id}, {load_manifest(place).dataset_hash[:12]}")
    request = Request(
        methods=(asked["training"],),
        dataset=str(place),
        agent=asked["agent"],
        base=asked["base"],
        name=job.job_id,
        adopt=True,
        ray=settings.finetuning.use_ray,
        overrides=asked["overrides"],
    )
    _note_comparison(jobs, job.job_id, run_training(settings, request, jobs.engine))


COMPARED = {"heldout/liked_nats_per_token": "nats a token of liked answers", "heldout/pair_accuracy": "pair accuracy"}


def _note_comparison(jobs: Jobs, job_id: str, report: Mapping[str, Any]) -> None:
    """What SFT on the same feedback came to, where it was trained beside the method that was asked for."""
    own = next(run for run in report["runs"] if run["job_id"] == job_id)
    for other in (run for run in report["runs"] if not run["asked"]):
        shown = [
            f"{name} {other['metrics'][key]:.4f} ({own['method']} {own['metrics'][key]:.4f})"
            for key, name in COMPARED.items()
            if key in other["metrics"] and key in own["metrics"]
        ]
        measured = ", ".join(shown) or "no held-out feedback to compare on; upload a validation file"
        data = {run["method"]: run["metrics"] for run in (other, own)}
        note(jobs.engine, job_id, f"{other['method'].upper()} on the same feedback: {measured}", data=data)
    for failed in report["failed"]:
        text = f"{failed['method'].upper()} on the same feedback failed: {failed['error']}"
        note(jobs.engine, job_id, text, level="warn")


def _package(settings: Settings, jobs: Jobs, job: Job) -> Job:
    """The dataset of the job's files."""
    asked = _asked(job)
    uploads = Uploads(jobs.engine, settings.files_root, job.tenant, job.workspace)
    parts = []
    for split, name in (("train", "training_file"), ("validation", "validation_file")):
        if asked[name] is not None:
            try:
                stored = uploads.get(asked[name])
            except NotFoundError:
                raise NotFoundError(f"{name} {asked[name]!r} was deleted before the job could read it") from None
            parts.append(Part(split, stored, uploads.path(stored)))
    made = package(jobs.engine, settings, parts, agent=asked["agent"])
    for stage in made.stages:
        for reason, number in stage.dropped.items():
            note(jobs.engine, job.job_id, f"{number} lines were dropped: {reason}", level="warn")
    return jobs.adopt(job.job_id, agent=asked["agent"], dataset_id=made.dataset_id, config={})


def _register(settings: Settings, database: Engine, job: Job) -> str:
    asked = _asked(job)
    adapter = TrainConfig.model_validate(job.config).out / "adapter"
    version = register_adapter(settings, database, asked["agent"], adapter)
    Registry(settings).tag(version, SERVED_AS_TAG, asked["served_as"])
    note(database, job.job_id, f"Registered as {version.id} ({version.name})", data={"version": version.id})
    return version.id


def _asked(job: Job) -> dict[str, Any]:
    if job.request is None:
        raise ConflictError(f"job {job.job_id!r} is no job of the fine-tuning API; go on with --resume")
    return job.request


def _settle(jobs: Jobs, job_id: str, error: BaseException) -> None:
    """Record the end, unless a pause, a cancellation or the training has done so."""
    text = str(error) if isinstance(error, RayloopError) else f"{type(error).__name__}: {error}"
    try:
        if jobs.get(job_id).state in ("pending", "running"):
            jobs.fail(job_id, text)
    except RayloopError as other:
        log.debug("the end of %s is recorded already: %s", job_id, other)
    if jobs.get(job_id).state == "failed":
        note(jobs.engine, job_id, f"The job failed: {text}", level="error")
