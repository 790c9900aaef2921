"""The table of training jobs: what was asked for, how far it is, how it ended.

A job is pending, then running, then completed or failed; a failed one may be tried again. Every change is
one conditional update, so two processes never both start the same job. A running job says regularly that
it lives; one that has been silent for long has lost its process and counts as failed.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.errors import ConflictError, NotFoundError
from cluster.tables import training_jobs

UNCOUNTED = ("loop",)
"""Kinds that only wait for others; they take no place among the concurrent jobs."""
STATES = ("pending", "running", "completed", "failed")
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
    finished_at_us: int | None


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
        max_concurrent: int | None = None,
        silent_s: float = 300.0,
    ) -> Job:
        """A new pending job.

        Raises:
            ConflictError: the id is taken, or the tenant runs as many jobs as it may.
        """
        if max_concurrent is not None:
            self.fail_lost(silent_s)
            running = sum(job.kind not in UNCOUNTED for job in self.list(state="running"))
            if running >= max_concurrent:
                raise ConflictError(
                    f"{running} jobs of tenant {self.tenant!r} run already and "
                    f"training.limits.max_concurrent_jobs is {max_concurrent}; wait for one to end"
                )
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
        }
        try:
            with write(self.engine).begin() as connection:
                connection.execute(training_jobs.insert().values(row))
        except sa.exc.IntegrityError:
            raise ConflictError(f"job {row['job_id']!r} exists already; choose another name or resume it") from None
        return self.get(str(row["job_id"]))

    def start(self, job_id: str) -> Job:
        """pending → running."""
        return self._move(job_id, ("pending",), state="running", started_at_us=now_us(), progress=_alive({}))

    def retry(self, job_id: str) -> Job:
        """failed (or running, when its process died) → pending, counted as one more try."""
        tries = training_jobs.c.retries + 1
        return self._move(
            job_id, ("failed", "running"), state="pending", retries=tries, error=None, finished_at_us=None
        )

    def progress(self, job_id: str, values: Mapping[str, Any]) -> None:
        """How far a running job is; also says that it lives."""
        self._move(job_id, ("running",), progress=_alive(values))

    def finish(self, job_id: str, *, output_version: str | None = None) -> Job:
        """running → completed."""
        return self._move(
            job_id, ("running",), state="completed", output_version=output_version, finished_at_us=now_us()
        )

    def set_output(self, job_id: str, version: str) -> None:
        """Name the version that a job's result was registered as."""
        self._move(job_id, ("running", "completed"), output_version=version)

    def fail(self, job_id: str, error: str) -> Job:
        """pending or running → failed, with the reason."""
        return self._move(job_id, ("pending", "running"), state="failed", error=error[:4000], finished_at_us=now_us())

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

    def _move(self, job_id: str, allowed: tuple[str, ...], **values: Any) -> Job:
        change = (
            training_jobs.update()
            .where(*self._mine(), training_jobs.c.job_id == job_id, training_jobs.c.state.in_(allowed))
            .values(**values)
        )
        with write(self.engine).begin() as connection:
            changed = connection.execute(change).rowcount
        job = self.get(job_id)
        if not changed:
            raise ConflictError(f"job {job_id!r} is {job.state}, not {' or '.join(allowed)}")
        return job

    def _mine(self) -> tuple[sa.ColumnElement[bool], ...]:
        return training_jobs.c.tenant == self.tenant, training_jobs.c.workspace == self.workspace


def _alive(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "at_us": now_us()}


def _last_sign(job: Job) -> int:
    return int((job.progress or {}).get("at_us") or job.started_at_us or job.created_at_us)
