"""What `rayloop train run` does: start the planned runs, and keep job table, MLflow and terminal current."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import stamina
from sqlalchemy.engine import Engine

from cluster import tracking
from cluster.errors import (
    ConflictError,
    HealthGateError,
    NotFoundError,
    RayloopError,
    UnavailableError,
)
from cluster.interruption import goes_on_with
from cluster.job_events import Kind, note
from cluster.jobs import Jobs
from cluster.settings import Settings
from cluster.signs_of_life import signs_of_life
from data.job_endings import append_job_ended
from data.manifest import Manifest
from train.config import TrainConfig
from train.files import write_file
from train.mailbox import Event
from train.plan import Planned, Request, plan_runs
from train.progress import Progress
from train.worker import run_here, run_on_ray

log = logging.getLogger(__name__)

ORIGIN = "origin.json"
"""Beside an adapter: the lineage of the run that made it, for `rayloop register`."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "ray", "safetensors")
SHOWN = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad",
    "eval_loss": "validation",
    "rewards/margins": "margin",
    "accuracy": "accuracy",
    "reward": "reward",
    "kl": "kl",
}
"""Values of the trainer's log on the progress line, and their names there."""
WHERE = {"pid": os.getpid(), "host": socket.gethostname()}
RECORD_TRIES, RECORD_WAIT_S = 8, 10.0  # about half a minute to write down that a run began or ended
NO_PARAMETERS: dict[str, Any] = {"health": True, "limits": True, "prompt": {"text", "recorded"}}
"""Fields that are no parameters in MLflow, or too long for one."""
LOGGED_POINTS = 100  # MLflow gets about so many points of a curve
Opening = Literal["create", "adopt", "beside", "resume"]
"""Where a run's row in the job table comes from; `beside` a job of the API, it runs in that one's place."""


def run_training(settings: Settings, request: Request, database: Engine) -> dict[str, Any]:
    """Plan, train and record; returns what the command prints.

    Raises:
        RayloopError: a run that was asked for failed; the others have been recorded.
    """
    jobs = Jobs(database, settings.tenant, settings.workspace)
    planned, manifest = plan_runs(settings, request, jobs)
    with going_on(request, planned), ExitStack() as stack:
        records = [Record(settings, jobs, run, manifest, _opening(request, run)) for run in planned]
        stack.callback(_abandon, records)
        for record in records:
            record.open()
        names = [run.job_id for run in planned]
        with signs_of_life(jobs, names, settings.training.job_silent_s):
            _run(settings, request, [run.config for run in planned], records)
    return report(records, manifest)


def going_on(request: Request, planned: Sequence[Planned]) -> AbstractContextManager[None]:
    """How an interrupted training is taken up again; a job of the API is by the API."""
    last = planned[-1]
    name = last.job_id.removesuffix(f".{last.config.method}")
    return nullcontext() if request.adopt else goes_on_with(f"rayloop train run --resume {name}")


def _opening(request: Request, run: Planned) -> Opening:
    if request.adopt:
        return "adopt" if run.asked else "beside"
    return "resume" if request.resume else "create"


def _run(settings: Settings, request: Request, configs: Sequence[TrainConfig], records: Sequence["Record"]) -> None:
    """Train; when the workers are lost, wait and start again what has not ended."""
    training = settings.training
    for attempt in range(training.job_retries + 1):
        try:
            _run_once(settings, request, configs, records)
            return
        except UnavailableError as error:
            if attempt == training.job_retries:
                raise
            wait_s = training.retry_backoff_s * 2**attempt
            log.warning("%s; starting again in %.0f s", error, wait_s)
            for record in records:
                record.again(error)
            time.sleep(wait_s)


def _run_once(
    settings: Settings, request: Request, configs: Sequence[TrainConfig], records: Sequence["Record"]
) -> None:
    def on_event(event: Event) -> None:
        take_patiently(records[event.run], event)

    if not request.ray:
        run_here(configs, on_event)
        return
    from cluster.runtime import ray_session

    with ray_session(settings):
        workers = request.workers or settings.training.workers
        run_on_ray(configs, workers=workers, max_failures=settings.training.max_failures, on_event=on_event)


def take_patiently(record: "Record", event: Event) -> None:
    """Record an event although MLflow or the database is away for a moment.

    A step that cannot be recorded is missing from the curve; that a run began or ended is tried again.

    Raises:
        ConflictError: somebody paused or cancelled the job.
    """
    passing = tracking.passing_errors()
    if event.kind in ("progress", "checkpoint"):
        try:
            record.take(event)
        except passing as error:
            log.warning("step %d of %s is not recorded: %s", event.step, record.run.job_id, str(error).splitlines()[0])
        return
    for attempt in stamina.retry_context(on=passing, attempts=RECORD_TRIES, timeout=None, wait_max=RECORD_WAIT_S):
        with attempt:
            record.take(event)


class Record:
    """One run in the job table, in MLflow and on the terminal."""

    def __init__(self, settings: Settings, jobs: Jobs, run: Planned, manifest: Manifest, opening: Opening) -> None:
        self.settings, self.jobs, self.run, self.manifest, self.opening = settings, jobs, run, manifest, opening
        self.latest: dict[str, Any] = {}
        self.stack = ExitStack()
        self.mlflow: tracking.Run | None = None
        self.bar: Progress | None = None
        self.result: dict[str, Any] | None = None
        self.error: RayloopError | None = None

    def open(self) -> None:
        """The row of the job and the MLflow run."""
        if self.opening == "resume":
            self.jobs.retry(self.run.job_id)
        elif self.opening == "adopt":
            config = self.run.config.model_dump(mode="json")
            self.jobs.adopt(
                self.run.job_id, agent=self.manifest.agent, dataset_id=self.manifest.dataset_id, config=config
            )
        elif self.opening == "beside":
            self._open_beside()
        else:
            self._create(self.run.config.limits.max_concurrent_jobs)

    def _open_beside(self) -> None:
        """A row of its own that takes no place; it has one already where the job beside it was interrupted."""
        try:
            state = self.jobs.get(self.run.job_id).state
        except NotFoundError:
            self._create(None)
            return
        if state in ("failed", "running"):
            self.jobs.retry(self.run.job_id)

    def _create(self, max_concurrent: int | None) -> None:
        self.jobs.create(
            self.run.config.method,
            job_id=self.run.job_id,
            agent=self.manifest.agent,
            dataset_id=self.manifest.dataset_id,
            config=self.run.config.model_dump(mode="json"),
            max_concurrent=max_concurrent,
            silent_s=self.settings.training.job_silent_s,
        )

    def take(self, event: Event) -> None:
        """Something happened in a worker."""
        if event.kind == "begin":
            self._begin(event.values or {})
        elif event.kind == "progress":
            self._progress(event)
        elif event.kind == "checkpoint":
            self._note(f"Checkpoint written at step {event.step}", "checkpoint", {"step": event.step, **self.latest})
        elif event.kind == "end" and event.result is not None and self.open_still:
            self._end(dict(event.result))
        elif event.kind == "fail" and event.error is not None:
            self.fail(event.error)

    def again(self, error: RayloopError) -> None:
        """The workers were lost; what has not ended will be started again."""
        if self.open_still and self.mlflow is not None:
            self.jobs.fail(self.run.job_id, str(error))
            self.jobs.retry(self.run.job_id)

    def _begin(self, values: Mapping[str, float]) -> None:
        if self.jobs.get(self.run.job_id).state == "pending":
            most, api = self.settings.training.limits.max_concurrent_jobs, self.opening in ("adopt", "beside")
            self.jobs.start(
                self.run.job_id,
                gpus=values.get("gpus", 0),
                max_concurrent=None if api else most,  # the API's wait for a place before
                silent_s=self.settings.training.job_silent_s,
            )
            self.jobs.progress(self.run.job_id, WHERE)
        if self.bar is not None:  # a worker that died has been replaced
            return
        if self.mlflow is None:
            tags = lineage(self.run, self.manifest)
            self.mlflow = self.stack.enter_context(tracking.run(self.settings, self.run.job_id, tags=tags))
        self.mlflow.log_params(self.run.config.model_dump(mode="json", exclude=NO_PARAMETERS))
        self.mlflow.log_dataset(
            name=self.manifest.dataset_id,
            digest=self.manifest.dataset_hash,
            uri=str(self.run.config.dataset),
            context="training",
        )
        self.bar = self.stack.enter_context(Progress(self.run.job_id, 0))

    def _progress(self, event: Event) -> None:
        values = dict(event.values or {})
        self.latest |= {**values, "step": event.step, "steps": event.steps}
        if self.bar is not None:
            self.bar.steps = event.steps
            self.bar.reached(
                event.step, values.get("num_tokens"), {SHOWN[k]: v for k, v in values.items() if k in SHOWN}
            )
            if self.bar.beat():
                self.jobs.progress(self.run.job_id, {**WHERE, "step": event.step, "steps": event.steps, **values})
        every = max(1, event.steps // LOGGED_POINTS)
        validation = any(name.startswith("eval_") for name in values)
        if self.mlflow is not None and (validation or event.step % every == 0 or event.step == event.steps):
            self.mlflow.log_metrics(_metric_names(values), event.step)
            if "loss" in values or validation:
                self._note(_step_line(event.step, event.steps, values), "metrics", {"step": event.step, **values})

    def _note(self, message: str, kind: Kind, data: Mapping[str, Any]) -> None:
        note(self.jobs.engine, self.run.job_id, message, kind=kind, data=data)

    def _end(self, result: dict[str, Any]) -> None:
        assert self.mlflow is not None
        self.mlflow.log_metrics(_metric_names({**result["metrics"], "seconds": result["seconds"]}), result["steps"])
        made = {"adapter_sha256": result["adapter_sha256"], "template_digest": result["template_digest"]}
        self.mlflow.set_tags({**made, "rayloop.warnings": result["warnings"]})
        if result["weights"] != "full":  # a whole model stays where it is
            self.mlflow.log_artifact(Path(result["adapter_dir"]), f"adapter/{result['adapter_sha256'][:12]}")
        if self.run.config.report_dir.is_dir():
            self.mlflow.log_artifact(self.run.config.report_dir, "report")
        origin = {**lineage(self.run, self.manifest), **made, "run_id": self.mlflow.run_id}
        write_file(Path(result["adapter_dir"]).parent / ORIGIN, json.dumps(origin, indent=2) + "\n")
        job = self.jobs.get(self.run.job_id)
        if job.state != "completed":  # not written down at an earlier try
            self.jobs.progress(self.run.job_id, {**WHERE, **self.latest, "steps": result["steps"]})
            for warning in result["warnings"]:
                note(self.jobs.engine, self.run.job_id, f"Warning: {warning}", level="warn")
            job = self.jobs.finish(self.run.job_id)
        append_job_ended(self.jobs.engine, job)
        self.result = {**result, "run_id": self.mlflow.run_id}
        self.stack.close()

    def fail(self, error: BaseException) -> None:
        """The run ended badly."""
        self.error = error if isinstance(error, RayloopError) else RayloopError(str(error) or type(error).__name__)
        if self.mlflow is not None:
            self.mlflow.set_tags({"rayloop.error": str(self.error)})
        self.stack.__exit__(type(error), error, None)
        job = self.jobs.get(self.run.job_id)
        if job.state != "failed":  # not written down at an earlier try
            job = self.jobs.fail(self.run.job_id, str(self.error))
        append_job_ended(self.jobs.engine, job, error)

    @property
    def open_still(self) -> bool:
        """True while neither result nor error is known."""
        return self.result is None and self.error is None


def _abandon(records: Sequence[Record]) -> None:
    """Runs without an end when the command ends are failed: interrupted, or their workers died."""
    for record in records:
        if record.open_still:
            try:
                record.fail(ConflictError("the command ended before the run; go on with --resume"))
            except RayloopError as error:
                log.debug("cannot record the end of %s: %s", record.run.job_id, error)


def lineage(run: Planned, manifest: Manifest) -> dict[str, str]:
    """Tags that say what a run was made of."""
    return {
        "rayloop.kind": "train",
        "rayloop.method": run.config.method,
        "rayloop.job_id": run.job_id,
        "rayloop.agent": manifest.agent or "",
        "dataset_id": manifest.dataset_id,
        "dataset_hash": manifest.dataset_hash,
        "base_model": run.config.base_model,
        "base_revision": run.base_revision,
        "init_adapter": run.config.init_adapter or "",
        "prompt_digest": run.config.prompt.digest if run.config.prompt else "",
        "rayloop.weights": run.config.weights,
        "rayloop.grader": run.grader_version,
        "seed": str(run.config.seed),
        "libraries": json.dumps({name: version(name) for name in LIBRARIES}),
    }


def report(records: Sequence[Record], manifest: Manifest) -> dict[str, Any]:
    """What the command prints: every run, the failed ones with their reason, and the last one asked for on top.

    Raises:
        RayloopError: nothing that was asked for ended well; it is the first reason.
    """
    failed = [record for record in records if record.error is not None]
    for record in failed:
        log.warning("%s failed: %s", record.run.job_id, record.error)
    runs = [_shown_run(record) for record in records if record.result is not None]
    asked = [run for run in runs if run["asked"]]
    if not asked:
        raise next(record.error for record in failed if record.run.asked and record.error is not None)
    return {
        **asked[-1],
        "dataset_id": manifest.dataset_id,
        "dataset_hash": manifest.dataset_hash,
        "runs": runs,
        "failed": [
            {"job_id": r.run.job_id, "method": r.run.config.method, "error": str(r.error), "gate": _is_gate(r.error)}
            for r in failed
        ],
    }


def _is_gate(error: RayloopError | None) -> bool:
    """True when a health gate stopped the run: trying again gives the same."""
    return isinstance(error, HealthGateError)


def _shown_run(record: Record) -> dict[str, Any]:
    assert record.result is not None
    kept = (
        "method", "run_id", "adapter_dir", "adapter_sha256", "weights", "metrics", "steps", "seconds", "warnings",
        "examples",
    )  # fmt: skip
    return {
        "job_id": record.run.job_id,
        **{name: record.result[name] for name in kept},
        "base_model": record.run.config.base_model,
        "asked": record.run.asked,
    }


def _step_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    named = {"loss": "training loss", "eval_loss": "validation loss"}
    shown = ", ".join(f"{named[name]}={values[name]:.4f}" for name in named if name in values)
    return f"Step {step}/{steps}: {shown}"


def _metric_names(values: Mapping[str, float]) -> dict[str, float]:
    """Trainer's names as MLflow groups them: `train/…`, `validation/…`, `heldout/…`."""
    named = {}
    for name, value in values.items():
        if name.startswith("eval_"):
            named[f"validation/{name.removeprefix('eval_')}"] = value
        elif name.startswith(("heldout/", "validation/", "system/")):
            named[name] = value
        else:
            named[f"train/{name}"] = value
    return named
