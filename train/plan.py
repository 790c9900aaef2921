"""What a training request comes to: the runs that will be made, checked as far as that goes without computing."""

import logging
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, DatasetError, InputError, NotFoundError
from cluster.jobs import Job, Jobs
from cluster.model_files import describe_base
from cluster.quota import check_quota
from cluster.registry import RETRAIN, Registry, Version
from cluster.runtime import starts_here
from cluster.settings import Settings
from data.grading import AtHand, make_grader
from data.manifest import Manifest, find_dataset, load_manifest
from train.config import METHOD_NAMES, TrainConfig, check_model_dir, resolve_config
from train.examples import check_data, read_data
from train.prompts import trained_prompt
from train.rewards import open_scorer

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
"""Of a training: it names a folder, rows of the job table and a run."""


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    methods: tuple[str, ...] = ()
    dataset: str = "latest"
    agent: str | None = None
    base: str | None = None
    name: str | None = None
    resume: str | None = None
    """Name of an earlier request, whose unfinished runs go on; everything else is taken from it."""
    adopt: bool = False
    """The job `name` is in the table already, pending: the fine-tuning API put it there."""
    workers: int | None = None
    ray: bool = True
    sft_baseline: bool | None = None
    overrides: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Planned:
    """One run that will be made."""

    job_id: str
    config: TrainConfig
    base_revision: str
    asked: bool
    """False: the SFT run that stands beside another for comparison."""
    grader_version: str = ""
    """GRPO: of the grader that gives the reward."""


def plan_runs(settings: Settings, request: Request, jobs: Jobs) -> tuple[list[Planned], Manifest]:
    """The runs of a request: new ones, those of an earlier request that have not ended, or the API's.

    Raises:
        InputError, NotFoundError, DatasetError, ConflictError: what was asked for cannot be trained.
    """
    check_quota(settings, jobs)
    workers = _workers(settings, request)
    if request.adopt:
        planned, manifest = _adopted(settings, request, jobs)
    elif request.resume:
        planned, manifest = plan_again(jobs, request.resume)
    else:
        planned, manifest = plan(settings, request, jobs.engine)
    for run in planned:
        run.config.steps(manifest.counts.get(run.config.kind, {}).get("train", 0), workers)
    return planned, manifest


def _workers(settings: Settings, request: Request) -> int:
    """How many train together.

    Raises:
        InputError: more than the cluster that is started for them holds: they would wait for ever.
    """
    workers = (request.workers or settings.training.workers) if request.ray else 1
    if request.ray and workers > settings.ray.num_cpus and starts_here(settings):
        rule = f"is more than the cluster started here holds, ray.num_cpus={settings.ray.num_cpus}"
        raise InputError("training.workers", workers, rule, "lower it, or join a larger cluster (`ray.address`)")
    return workers


def plan(settings: Settings, request: Request, database: Engine) -> tuple[list[Planned], Manifest]:
    """The runs of a request, checked as far as that goes without computing.

    Raises:
        InputError, NotFoundError, DatasetError: what was asked for cannot be trained.
    """
    dataset = find_dataset(settings, request.dataset, agent=request.agent)
    manifest = load_whole(dataset)
    agent = request.agent or manifest.agent
    base, adapter = resolve_base(settings, request.base, agent)
    check_model_dir(base)
    revision = describe_base(base)[1]
    methods = _with_baseline(settings, request, manifest)
    name = request.name or f"{request.methods[-1]}-{uuid.uuid4().hex[:8]}"
    if not NAME.fullmatch(name):
        raise InputError("name", name, "must be 1 to 48 letters, digits, `.`, `_` or `-`", "choose another name")
    planned = []
    for method in methods:
        asked = method in request.methods
        job_id = name if len(methods) == 1 or (request.adopt and asked) else f"{name}.{method}"
        overrides = dict(request.overrides or {})
        if request.adopt and not asked:
            overrides.pop("learning_rate", None)  # chosen for the method that was asked for
        config = resolve_config(
            settings,
            method,
            base_model=base,
            init_adapter=adapter,
            dataset=dataset,
            prompt=trained_prompt(database, settings.tenant, agent, manifest),
            out=settings.home / "training" / job_id,
            prompts="tasks" if manifest.total("task") else None,
            **overrides,
        )
        check_data(method, config.kind, read_data(dataset, config.kind), dataset)
        planned.append(Planned(job_id, config, revision, asked, grader_version(config)))
    return planned, manifest


def load_whole(dataset: Path) -> Manifest:
    """The manifest of a dataset that may be learned from.

    Raises:
        DatasetError: somebody in it was erased since it was made.
    """
    manifest = load_manifest(dataset)
    if manifest.erased_rows:
        raise DatasetError(
            f"{manifest.erased_rows} examples of {manifest.dataset_id} were erased since it was made; "
            "run `rayloop curate` and train on the new one"
        )
    return manifest


def grader_version(config: TrainConfig) -> str:
    """Version of the grader that a run learns from; empty where there is none.

    Raises:
        InputError: it cannot be made.
    """
    if config.method != "grpo":
        return ""
    scorer = open_scorer(config.reward_model)
    return make_grader(config.grader, field="training.grpo.grader", at_hand=AtHand(scorer=scorer)).version


def plan_again(jobs: Jobs, name: str) -> tuple[list[Planned], Manifest]:
    """The unfinished runs of an earlier request, as they were.

    Raises:
        NotFoundError: no request of this name.
        ConflictError: all of it is done, or a process is still at it.
    """
    trainings = [job for job in reversed(jobs.list(limit=1000)) if job.kind in METHOD_NAMES]
    known = [job for job in trainings if job.job_id == name or job.job_id.startswith(f"{name}.")]
    if any(job.request is not None for job in known):
        raise ConflictError(f"training {name!r} belongs to the fine-tuning API; resume it there")
    if not known:
        raise NotFoundError(f"no training job {name!r}; see `rayloop jobs`")
    left = [job for job in known if job.state != "completed"]
    if not left:
        raise ConflictError(f"training {name!r} is completed; there is nothing to resume")
    for job in left:
        check_stopped(job)
    planned = [_as_it_was(job) for job in left]
    return planned, load_whole(planned[0].config.dataset)


def check_stopped(job: Job) -> None:
    """Refuse to go on with a job whose process is still at it.

    Raises:
        ConflictError: it runs on this machine.
    """
    where = job.progress or {}
    if job.state == "running" and where.get("host") == socket.gethostname() and psutil.pid_exists(where["pid"]):
        raise ConflictError(f"job {job.job_id!r} still runs, as process {where['pid']}")


def _as_it_was(job: Job, *, asked: bool = True) -> Planned:
    config = TrainConfig.model_validate(job.config)
    revision = describe_base(config.base_model)[1]
    return Planned(job.job_id, config, revision, asked, grader_version=grader_version(config))


def _adopted(settings: Settings, request: Request, jobs: Jobs) -> tuple[list[Planned], Manifest]:
    """The run of a job of the API and the SFT run beside it: as planned in an earlier life, else planned anew."""
    job = jobs.get(str(request.name))
    if not job.config:
        return plan(settings, request, jobs.engine)
    planned = [*(_as_it_was(other, asked=False) for other in jobs.beside(job.job_id)), _as_it_was(job)]
    return planned, load_whole(planned[-1].config.dataset)


def _with_baseline(settings: Settings, request: Request, manifest: Manifest) -> list[str]:
    """The methods asked for, with SFT on the same feedback beside DPO and KTO."""
    wanted = settings.training.sft_baseline if request.sft_baseline is None else request.sft_baseline
    methods = list(dict.fromkeys(request.methods))
    if not wanted or "sft" in methods or not {"dpo", "kto"} & set(methods):
        return methods
    if not manifest.counts.get("sft", {}).get("train"):
        log.warning("no SFT examples in dataset %s: nothing to report beside %s", manifest.dataset_id, methods)
        return methods
    return ["sft", *methods]


def resolve_base(settings: Settings, ref: str | None, agent: str | None) -> tuple[str, str | None]:
    """Base model and adapter to start from: of a path, a hub id, or a registered version.

    Without `ref` it is the base model of the agent's champion, else the configured one.

    Raises:
        ConflictError: somebody in what the version learned from was erased.
    """
    registry = Registry(settings)
    if ref is None:
        try:
            champion = registry.get(f"{agent}@champion")
        except (NotFoundError, InputError):
            return settings.training.base_model, None
        if champion.adapter_sha256 is None:
            _refuse_tainted(champion)
        return champion.base_model, None
    named = named_version(ref)
    if named is None:
        return ref, None
    found = registry.get(named)
    _refuse_tainted(found)
    return found.base_model, str(registry.adapter_dir(found)) if found.adapter_sha256 else None


def named_version(ref: str) -> str | None:
    """What `triage/3`, `triage@champion` or `models:/triage@champion` names; `None` for a path or hub id."""
    plain = ref.removeprefix("models:/")
    return plain if ("@" in plain or plain.rpartition("/")[2].isdecimal()) and not Path(ref).exists() else None


def _refuse_tainted(version: Version) -> None:
    if version.needs_retraining:
        raise ConflictError(f"{version.id} cannot be trained further: {RETRAIN}; start from another version or base")
