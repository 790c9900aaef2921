"""The table of training jobs: what was asked for, how far it is, how it ended.

A job is pending, then running, then completed or failed; it may be paused or cancelled before its end, and a
failed or paused one goes on when somebody asks for it. Every change is one conditional update, so two
processes never both start the same job. A running job says regularly that it lives; one that has been silent
for long has lost its process and counts as failed.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import is_postgres, write
from cluster.errors import ConflictError, NotFoundError, OverloadedError
from cluster.tables import training_jobs

REMOTE = "remote"
"""Kind of a training that another endpoint does."""
UNCOUNTED = ("loop", REMOTE)
"""Kinds that only wait for others; they take no place among the concurrent jobs."""
STATES = ("pending", "running", "paused", "completed", "failed", "cancelled")
ACTIVE = ("pending", "running", "paused")
TENANT_LOCK = 7_213_002
"""First key of the PostgreSQL advisory lock under which a tenant's jobs are counted and one is added."""
LOST = "its process has gone without a word"


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    job_id: str
    tenant: str
    workspace: str
    agent: str | None
    kind: str
    """`sft`, `dpo`, `kto`, `tune`, …"""
    dataset_id: str | None
    config: dict[str, Any]
    state: str
    progress: dict[str, Any] | None
    retries: int
    output_version: str | None
    error: str | None
    created_at_us: int
    started_at_us: int | None
    """When it last began to run."""
    finished_at_us: int | None
    used_s: float
    """How long it ran in all its earlier lives."""
    gpus: float
    """How many it has in this life."""
    used_gpu_s: float
    """As `used_s`, times the GPUs of each life."""
    request: dict[str, Any] | None
    """What a client of the fine-tuning API asked for; `None` for jobs of the command line."""
    runner: dict[str, Any] | None
    """The process started for it: `token`, then `host`, `pid` and `created` once it has reported."""
    stopping: bool
    """Its process is to end."""
    fine_tuned_model: str | None
    """Name under which the result is served."""


@dataclass(frozen=True)
class Usage:
    """What the trainings of a tenant have used."""

    run_s: float
    gpu_s: float
    """Seconds times GPUs."""


class Jobs:
    """The jobs of one tenant and workspace."""

    def __init__(self, engine: Engine, tenant: str, workspace: str) -> None:
        self.engine, self.tenant, self.workspace = engine, tenant, workspace

    def create(
        self,
        kind: str,
        *,
        agent: str | None = None,
        dataset_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        job_id: str | None = None,
        request: Mapping[str, Any] | None = None,
        max_concurrent: int | None = None,
        max_active: int | None = None,
        silent_s: float = 300.0,
    ) -> Job:
        """A new pending job. `max_active` bounds the API's jobs of this tenant that have not ended.

        Raises:
            ConflictError: the id is taken, or the tenant runs as many jobs as it may.
            OverloadedError: the tenant has as many active jobs as it may.
        """
        if max_concurrent is not None:
            self.fail_lost(silent_s)
        row = {
            "job_id": job_id or f"{kind}-{uuid.uuid4().hex[:10]}",
            "tenant": self.tenant,
            "workspace": self.workspace,
            "agent": agent,
            "kind": kind,
            "dataset_id": dataset_id,
            "config": dict(config or {}),
            "state": "pending",
            "retries": 0,
            "created_at_us": now_us(),
            "request": None if request is None else dict(request),
        }
        try:
            with write(self.engine).begin() as connection:
                if max_active is not None:
                    self._check_active(connection, max_active)
                if max_concurrent is not None:
                    self._check_running(connection, max_concurrent, silent_s)
                connection.execute(training_jobs.insert().values(row))
        except sa.exc.IntegrityError:
            raise ConflictError(f"job {row['job_id']!r} exists already; choose another name or resume it") from None
        return self.get(str(row["job_id"]))

    def _check_active(self, connection: Connection, max_active: int) -> None:
        """Counted in the transaction that adds the job: two requests never share a place."""
        self._alone(connection)
        asked = training_jobs.c.request.is_not(None) & training_jobs.c.state.in_(ACTIVE)
        query = sa.select(sa.func.count()).select_from(training_jobs)
        active = connection.execute(query.where(training_jobs.c.tenant == self.tenant, asked)).scalar_one()
        if active >= max_active:
            raise OverloadedError(
                f"tenant {self.tenant!r} has {active} unfinished jobs and finetuning.max_active_jobs is {max_active}; "
                "cancel one or wait for it",
                retry_after_s=60.0,
            )

    def _check_running(self, connection: Connection, max_concurrent: int, silent_s: float) -> None:
        """Counted in the transaction that adds or starts the job, over all workspaces; the lost take no place."""
        self._alone(connection)
        running = count_running(connection, self.tenant, silent_s)
        if running >= max_concurrent:
            raise ConflictError(
                f"{running} jobs of tenant {self.tenant!r} run already and "
                f"training.limits.max_concurrent_jobs is {max_concurrent}; wait for one to end"
            )

    def _alone(self, connection: Connection) -> None:
        """No other transaction counts this tenant's jobs until this one has ended; SQLite has one writer anyway."""
        if is_postgres(self.engine):
            tenant = int.from_bytes(hashlib.sha256(self.tenant.encode()).digest()[:4], "big", signed=True)
            lock = {"first": TENANT_LOCK, "second": tenant}
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:first, :second)"), lock)

    def adopt(self, job_id: str, *, agent: str | None, dataset_id: str, config: Mapping[str, Any]) -> Job:
        """Say what a pending job of the API will train."""
        return self._move(job_id, ("pending",), agent=agent, dataset_id=dataset_id, config=dict(config))

    def pause(self, job_id: str) -> Job:
        """pending or running → paused; its process is to end."""
        return self._move(job_id, ("pending", "running"), state="paused", stopping=training_jobs.c.runner.is_not(None))

    def resume(self, job_id: str) -> Job:
        """paused or failed → pending, counted as one more try.

        Raises:
            ConflictError: in another state, or its process has not ended yet.
        """
        return self._move(
            job_id, ("paused", "failed"), state="pending", retries=training_jobs.c.retries + 1, error=None,
            finished_at_us=None, only=training_jobs.c.runner.is_(None),
        )  # fmt: skip

    def cancel(self, job_id: str) -> Job:
        """pending, running or paused → cancelled for good; its process is to end."""
        stopping = training_jobs.c.runner.is_not(None)
        return self._move(job_id, ACTIVE, state="cancelled", stopping=stopping, finished_at_us=now_us())

    def start(self, job_id: str, *, gpus: float = 0, max_concurrent: int | None = None, silent_s: float = 300.0) -> Job:
        """pending → running, on so many GPUs.

        Raises:
            ConflictError: the tenant runs as many jobs as it may, or the job is in another state.
        """
        check = None if max_concurrent is None else partial(
            self._check_running, max_concurrent=max_concurrent, silent_s=silent_s
        )  # fmt: skip
        return self._move(
            job_id, ("pending",), check=check, state="running", started_at_us=now_us(), gpus=gpus, progress=_alive({})
        )

    def retry(self, job_id: str) -> Job:
        """failed (or running, when its process died) → pending, counted as one more try."""
        tries = training_jobs.c.retries + 1
        return self._move(
            job_id, ("failed", "running"), state="pending", retries=tries, error=None, finished_at_us=None
        )

    def progress(self, job_id: str, values: Mapping[str, Any]) -> None:
        """How far a running job is; also says that it lives."""
        self._move(job_id, ("running",), progress=_alive(values))

    def beat(self, job_id: str) -> None:
        """Say that a job lives which has nothing else to say; nothing happens to one that has ended."""
        mine = (*self._mine(), training_jobs.c.job_id == job_id, training_jobs.c.state.in_(("pending", "running")))
        with write(self.engine).begin() as connection:
            row = connection.execute(sa.select(training_jobs.c.progress).where(*mine).with_for_update()).first()
            if row is not None:
                connection.execute(training_jobs.update().where(*mine).values(progress=_alive(row.progress or {})))

    def finish(self, job_id: str, *, output_version: str | None = None) -> Job:
        """running → completed."""
        return self._move(
            job_id, ("running",), state="completed", output_version=output_version, finished_at_us=now_us()
        )

    def set_output(self, job_id: str, version: str) -> None:
        """Name the version that a job's result was registered as."""
        self._move(job_id, ("running", "completed"), output_version=version)

    def fail(self, job_id: str, error: str, *, states: tuple[str, ...] = ("pending", "running")) -> Job:
        """pending or running → failed, with the reason."""
        return self._move(job_id, states, state="failed", error=error[:4000], finished_at_us=now_us())

    def fail_lost(self, silent_s: float) -> list[str]:
        """Mark running jobs that have been silent for so long as failed; returns their ids."""
        border = now_us() - round(silent_s * SECOND_US)
        lost = [job.job_id for job in self.list(state="running") if _last_sign(job) < border]
        for job_id in lost:
            self.fail(job_id, LOST)
        return lost

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            NotFoundError: there is none of this id.
        """
        query = sa.select(training_jobs).where(*self._mine(), training_jobs.c.job_id == job_id)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFoundError(f"no job {job_id!r}; see `rayloop jobs`")
        return Job(**row)

    def list(self, *, state: str | None = None, limit: int = 100) -> list[Job]:
        """Newest first."""
        query = sa.select(training_jobs).where(*self._mine()).order_by(training_jobs.c.created_at_us.desc())
        if state is not None:
            query = query.where(training_jobs.c.state == state)
        with self.engine.connect() as connection:
            return [Job(**row) for row in connection.execute(query.limit(limit)).mappings()]

    def beside(self, job_id: str) -> "Iterator[Job]":
        """Jobs that were made for comparison with this one: they are named `<job_id>.<method>`."""
        query = sa.select(training_jobs).where(
            *self._mine(), training_jobs.c.job_id.startswith(f"{job_id}.", autoescape=True)
        )
        with self.engine.connect() as connection:
            yield from (Job(**row) for row in connection.execute(query).mappings().all())

    def requested(self, *, after: str | None = None, metadata: Mapping[str, str] | None = None) -> Iterator[Job]:
        """The API's jobs, newest first, behind the one named.

        Raises:
            NotFoundError: `after` names none.
        """
        j = training_jobs.c
        query = sa.select(training_jobs).where(*self._mine(), j.request.is_not(None))
        if after is not None:
            last = self.get(after)
            query = query.where(sa.tuple_(j.created_at_us, j.job_id) < (last.created_at_us, last.job_id))
        with self.engine.connect() as connection:
            for row in connection.execute(query.order_by(j.created_at_us.desc(), j.job_id.desc())).mappings():
                job = Job(**row)
                has = (job.request or {}).get("metadata") or {}
                if all(has.get(name) == value for name, value in (metadata or {}).items()):
                    yield job

    def set_served(self, job_id: str, model: str) -> Job:
        """Name the model under which a completed job's result is served."""
        return self._move(job_id, ("completed",), fine_tuned_model=model)

    def count_since(self, kind: str, since_us: int) -> int:
        """Jobs of a kind that this tenant made since then, in every workspace."""
        j = training_jobs.c
        query = sa.select(sa.func.count()).select_from(training_jobs)
        query = query.where(j.tenant == self.tenant, j.kind == kind, j.created_at_us >= since_us)
        with self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def usage(self, since_us: int) -> Usage:
        """What this tenant's jobs created since then have used here, in every workspace."""
        j, now = training_jobs.c, now_us()
        mine = (j.tenant == self.tenant) & (j.created_at_us >= since_us) & j.kind.not_in(UNCOUNTED)
        query = sa.select(sa.func.sum(j.used_s + _running_s(now)), sa.func.sum(j.used_gpu_s + _running_s(now) * j.gpus))
        with self.engine.connect() as connection:
            run_s, gpu_s = connection.execute(query.where(mine)).one()
        return Usage(float(run_s or 0), float(gpu_s or 0))

    def _move(
        self,
        job_id: str,
        allowed: tuple[str, ...],
        *,
        only: sa.ColumnElement[bool] | None = None,
        check: Callable[[Connection], None] | None = None,
        **values: Any,
    ) -> Job:
        if "state" in values and values["state"] != "running":
            j, ran_s = training_jobs.c, _running_s(now_us())
            values |= {"used_s": j.used_s + ran_s, "used_gpu_s": j.used_gpu_s + ran_s * j.gpus}
        change = (
            training_jobs.update()
            .where(*self._mine(), training_jobs.c.job_id == job_id, training_jobs.c.state.in_(allowed))
            .where(only if only is not None else sa.true())
            .values(**values)
        )
        with write(self.engine).begin() as connection:
            if check is not None:
                check(connection)
            changed = connection.execute(change).rowcount
        job = self.get(job_id)
        if not changed and job.state in allowed:
            raise ConflictError(f"the process of job {job_id!r} has not ended yet; try again in a moment")
        if not changed:
            raise ConflictError(f"job {job_id!r} is {job.state}, not {' or '.join(allowed)}")
        return job

    def _mine(self) -> tuple[sa.ColumnElement[bool], ...]:
        return training_jobs.c.tenant == self.tenant, training_jobs.c.workspace == self.workspace


def count_running(connection: Connection, tenant: str, silent_s: float) -> int:
    """Jobs of a tenant that run or whose process has been started, in all workspaces.

    Those of the command line that have been silent for so long count as dead; the API's are released when they are. An
    SFT run beside a job of the API runs in that one's place.
    """
    j = training_jobs.c
    busy = (j.state == "running") | ((j.state == "pending") & j.runner.is_not(None))
    query = sa.select(training_jobs).where(j.tenant == tenant, j.kind.not_in(UNCOUNTED), busy)
    found = [Job(**row) for row in connection.execute(query).mappings()]
    border, served = now_us() - round(silent_s * SECOND_US), {job.job_id for job in found if job.runner is not None}
    own = (job for job in found if job.job_id.rpartition(".")[0] not in served)
    return sum(job.runner is not None or _last_sign(job) >= border for job in own)


def _running_s(now: int) -> sa.ColumnElement[float]:
    """Seconds since the start of jobs that run; 0 for others."""
    seconds = (now - training_jobs.c.started_at_us) / float(SECOND_US)
    return sa.case((training_jobs.c.state == "running", seconds), else_=0.0)


def _alive(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "at_us": now_us()}


def _last_sign(job: Job) -> int:
    return int((job.progress or {}).get("at_us") or job.started_at_us or job.created_at_us)
