"""Which process works on a job: the tenant-free side of the job table, for who starts and ends processes.

A process is claimed with a token before it is started and reports itself with the same token, so one that
comes late, or twice, learns that the job is no longer its own.
"""

import os
import socket
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.errors import ConflictError, NotFoundError
from cluster.jobs import UNCOUNTED, Job
from cluster.tables import training_jobs

Runner = dict[str, Any]


class Runners:
    """The processes of all tenants' API jobs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def open_jobs(self) -> list[Job]:
        """API jobs about which something may have to be done, oldest first."""
        j = training_jobs.c
        waiting = j.state.in_(("pending", "running")) | ((j.state == "completed") & j.fine_tuned_model.is_(None))
        query = sa.select(training_jobs).where(j.request.is_not(None), waiting | j.runner.is_not(None))
        with self.engine.connect() as connection:
            return [Job(**row) for row in connection.execute(query.order_by(j.created_at_us)).mappings()]

    def find(self, job_id: str) -> Job:
        """A job of any tenant.

        Raises:
            NotFoundError: there is none of this id.
        """
        query = sa.select(training_jobs).where(training_jobs.c.job_id == job_id)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFoundError(f"no job {job_id!r}; see `rayloop jobs`")
        return Job(**row)

    def usage_s(self) -> dict[str, float]:
        """Tenant -> seconds that its jobs have run, without the current life of those that run now."""
        j = training_jobs.c
        query = sa.select(j.tenant, sa.func.sum(j.used_s)).where(j.kind.not_in(UNCOUNTED)).group_by(j.tenant)
        with self.engine.connect() as connection:
            return {tenant: float(total) for tenant, total in connection.execute(query)}

    def claim(self, job_id: str, states: Sequence[str]) -> str | None:
        """Take a job for a new process; its token, or `None` where another was quicker."""
        token = uuid.uuid4().hex
        j = training_jobs.c
        free = (j.job_id == job_id) & j.runner.is_(None) & j.state.in_(states) & ~j.stopping
        starts = {"token": token, "claimed_at_us": now_us()}
        with write(self.engine).begin() as connection:
            changed = connection.execute(training_jobs.update().where(free).values(runner=starts)).rowcount
        return token if changed else None

    def report(self, job_id: str, token: str) -> None:
        """This process works on the job; called by it first of all.

        Raises:
            ConflictError: the job belongs to another process by now, or is to stop.
        """
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "created": psutil.Process().create_time()}

        def change(runner: Runner | None, stopping: bool) -> Runner | None:
            if runner is None or runner["token"] != token or stopping:
                raise ConflictError(f"job {job_id!r} is not this process's; somebody paused it or started another")
            return {**runner, **mine}

        self._rewrite(job_id, change)

    def add(self, job_id: str, token: str, **values: Any) -> None:
        """Remember more about the process, for example its Ray job."""
        self._rewrite(job_id, lambda runner, _: {**runner, **values} if runner and runner["token"] == token else runner)

    def release(self, job_id: str, token: str) -> None:
        """The process is gone."""

        def change(runner: Runner | None, _: bool) -> Runner | None:
            return None if runner is not None and runner["token"] == token else runner

        self._rewrite(job_id, change, stopping=False)

    def _rewrite(self, job_id: str, change: Callable[[Runner | None, bool], Runner | None], **values: Any) -> None:
        query = sa.select(training_jobs.c.runner, training_jobs.c.stopping).where(training_jobs.c.job_id == job_id)
        with write(self.engine).begin() as connection:
            row = connection.execute(query.with_for_update()).first()
            if row is None:
                raise NotFoundError(f"no job {job_id!r}; see `rayloop jobs`")
            new = change(row.runner, row.stopping)
            update = training_jobs.update().where(training_jobs.c.job_id == job_id)
            connection.execute(update.values(runner=sa.null() if new is None else new, **values))
