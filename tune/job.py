"""A sweep in the job table: `rayloop jobs` lists it, says how many of its trials have ended, and how it ended."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.database import connect
from cluster.jobs import Jobs
from cluster.quota import check_quota
from cluster.settings import Settings
from data.job_endings import append_job_ended
from data.manifest import load_manifest
from train.plan import check_stopped
from tune.spec import Sweep

KIND = "tune"
INTERRUPTED = "the command ended before the sweep; go on with --resume"


@contextmanager
def new_job(settings: Settings, sweep: Sweep) -> Iterator[None]:
    """The job of a sweep that begins, named like it; it ends completed or failed, with the block.

    Raises:
        ConflictError: the tenant runs as many jobs as it may, or has used up its quota.
    """
    manifest = load_manifest(Path(sweep.dataset))
    with _jobs(settings) as jobs:
        check_quota(settings, jobs)
        jobs.create(
            KIND,
            job_id=sweep.sweep_id,
            agent=sweep.agent or manifest.agent,
            dataset_id=manifest.dataset_id,
            config=sweep.to_json(),
            max_concurrent=settings.training.limits.max_concurrent_jobs,
            silent_s=settings.training.job_silent_s,
        )
        with _running(jobs, sweep.sweep_id):
            yield


@contextmanager
def job_again(settings: Settings, sweep_id: str) -> Iterator[None]:
    """The job of a sweep that goes on; one that is completed stays so.

    Raises:
        NotFoundError: it has none.
        ConflictError: its process is still at it, or the tenant has used up its quota.
    """
    with _jobs(settings) as jobs:
        job = jobs.get(sweep_id)
        if job.state == "completed":
            yield
            return
        check_quota(settings, jobs)
        check_stopped(job)
        if job.state != "pending":
            jobs.retry(sweep_id)
        with _running(jobs, sweep_id):
            yield


def tell(settings: Settings, sweep_id: str, ended: int, trials: int) -> None:
    """Say that a sweep lives, and how far it is; nothing happens to one that has ended."""
    with _jobs(settings) as jobs:
        if jobs.get(sweep_id).state == "running":
            jobs.progress(sweep_id, {**_where(), "ended": ended, "trials": trials})


@contextmanager
def _jobs(settings: Settings) -> Iterator[Jobs]:
    engine = connect(settings)
    try:
        yield Jobs(engine, settings.tenant, settings.workspace)
    finally:
        engine.dispose()


@contextmanager
def _running(jobs: Jobs, job_id: str) -> Iterator[None]:
    jobs.start(job_id)
    jobs.progress(job_id, _where())
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        reason = INTERRUPTED if interrupted else str(error) or type(error).__name__
        append_job_ended(jobs.engine, jobs.fail(job_id, reason), error)
        raise
    append_job_ended(jobs.engine, jobs.finish(job_id))


def _where() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname()}
