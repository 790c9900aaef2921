"""Starts what waits, ends what was paused or cancelled, notices what died, serves what succeeded.

One pass looks at every open job once. All it knows is in the job table, so it may itself be killed between any
two lines; a process it started is claimed in the table before it exists and reports there by itself.
"""

import csv
import io
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
import sqlalchemy as sa
import yaml
from sqlalchemy.engine import Engine

from cluster import metrics
from cluster.background import ask_to_end, find_process, kill_family, last_line, start_detached
from cluster.clock import SECOND_US, now_us
from cluster.database import connect
from cluster.errors import ConflictError, RayloopError
from cluster.job_events import note, read_events
from cluster.jobs import Job, Jobs, count_running
from cluster.registry import Registry
from cluster.runners import Runners
from cluster.settings import Settings
from data.finetuning.uploads import Uploads
from serve import servables
from serve.adapter_store import adapter_location
from serve.config import write_private
from serve.finetuning.objects import result_file_id

log = logging.getLogger(__name__)

CURVE = ("step", "train_loss", "valid_loss", "train_mean_token_accuracy", "learning_rate")
RESULTS_PURPOSE = "fine-tune-results"


class Processes(Protocol):
    """Where the jobs' processes run."""

    def start(self, job: Job, token: str) -> dict[str, object]:
        """Start one; what to remember of it."""

    def alive(self, job: Job) -> bool:
        """False when it is gone for certain."""

    def end(self, job: Job, *, insist: bool) -> None:
        """Ask it to end, or kill it."""

    def last_word(self, job: Job) -> str:
        """The end of what it wrote."""


class Dispatcher:
    """The jobs of every tenant."""

    def __init__(self, settings: Settings, database: Engine, processes: Processes | None = None) -> None:
        self.settings, self.database = settings, database
        self.runners = Runners(database)
        self.processes = processes or processes_for(settings)
        self._asked: dict[str, float] = {}
        """Token -> when its process was asked to end."""
        self._wanted: dict[str, float] = {}
        """Job -> when the engine was asked for its model."""
        self._starts: dict[str, int] = {}

    def tick(self) -> None:
        """One pass; a job that cannot be handled does not stop the others."""
        jobs = self.runners.open_jobs()
        for job in jobs:
            try:
                self._look_at(job)
            except (RayloopError, OSError) as error:
                log.warning("job %s: %s", job.job_id, error)
            except Exception:  # a defect about one job must not end the loop that serves the others
                log.exception("job %s", job.job_id)
        self._start_waiting()
        self._export_usage()

    def _jobs(self, job: Job) -> Jobs:
        return Jobs(self.database, job.tenant, job.workspace)

    def _look_at(self, job: Job) -> None:
        if job.runner is not None:
            self._look_at_process(job)
        elif job.state == "completed" and job.output_version is None:
            self._start_again(job)
        elif job.state == "completed":
            self._serve(job)

    def _look_at_process(self, job: Job) -> None:
        assert job.runner is not None
        token = job.runner["token"]
        if self.processes.alive(job):
            if job.stopping:
                asked = self._asked.setdefault(token, time.monotonic())
                insist = time.monotonic() - asked > self.settings.finetuning.stop_grace_s
                self.processes.end(job, insist=insist)
            return
        self._asked.pop(token, None)
        if job.state in ("pending", "running"):
            self._lost(job)
        if job.state == "cancelled":  # before its release: whoever comes after a dispatcher that died does it again
            names = [job.job_id, *(other.job_id for other in self._jobs(job).beside(job.job_id))]
            for name in names:
                shutil.rmtree(self.settings.home / "training" / name, ignore_errors=True)
        self.runners.release(job.job_id, token)

    def _lost(self, job: Job) -> None:
        """Its process ended without a word."""
        said = self.processes.last_word(job)
        reason = "its process ended without a word, killed perhaps" + (f"; it last said: {said}" if said else "")
        try:
            self._jobs(job).fail(job.job_id, f"{reason}; resume the job to go on from its last checkpoint")
        except ConflictError:
            return  # it had ended properly after the row was read
        note(self.database, job.job_id, f"The job failed: {reason}", level="error")

    def _start_again(self, job: Job) -> None:
        """The training is done and its process died before the result was registered."""
        started = self._starts[job.job_id] = self._starts.get(job.job_id, 0) + 1
        if started > self.settings.finetuning.max_starts:
            reason = f"its result could not be registered: {self.processes.last_word(job)}"
            self._jobs(job).fail(job.job_id, reason, states=("completed",))
            note(self.database, job.job_id, f"The job failed: {reason}", level="error")
            return
        self._start(job, ("completed",))

    def _start_waiting(self) -> None:
        """Start as many waiting jobs of each tenant as it may run."""
        most = self.settings.training.limits.max_concurrent_jobs
        for job in self.runners.open_jobs():
            if job.state != "pending" or job.runner is not None or job.stopping:
                continue
            with self.database.connect() as connection:
                running = count_running(connection, job.tenant, self.settings.training.job_silent_s)
            if running < most:
                self._start(job, ("pending",))

    def _start(self, job: Job, states: Sequence[str]) -> None:
        token = self.runners.claim(job.job_id, states)
        if token is None:
            return
        try:
            self.runners.add(job.job_id, token, **self.processes.start(job, token))
        except RayloopError as error:
            log.warning("job %s cannot be started: %s", job.job_id, error)
            self.runners.release(job.job_id, token)

    # serving what succeeded

    def _serve(self, job: Job) -> None:
        """Ask the engine for the model; the job has succeeded when it is ready, or cannot be."""
        assert job.request is not None and job.output_version is not None
        name = job.request["served_as"]
        if job.job_id not in self._wanted:
            registry = Registry(self.settings)
            version = registry.get(job.output_version)
            location = adapter_location(registry, version)
            engine = self.settings.engine.name
            servables.want(self.database, version, engine, adapter_location=location, alias=name)
            self._wanted[job.job_id] = time.monotonic()
        problem = self._not_ready(job.output_version, self._wanted[job.job_id])
        if problem is None:
            return
        if problem:
            note(self.database, job.job_id, f"{name} is not served: {problem}", level="warn")
        self._write_results(job)
        self._jobs(job).set_served(job.job_id, name)
        note(self.database, job.job_id, "The job has succeeded", data={"fine_tuned_model": name})
        del self._wanted[job.job_id]

    def _not_ready(self, version: str, wanted_at: float) -> str | None:
        """Empty when every replica holds it, the reason when none will, `None` while that is open."""
        live_s = self.settings.engine.live_after_s
        if servables.ready(self.database, version, live_after_s=live_s):
            return ""
        failed = [report.reason for report in servables.reports(self.database, version) if report.state == "failed"]
        if failed:
            return failed[0] or "the engine gave no reason"
        if not servables.engine_lives(self.database, self.settings.engine.name, live_after_s=live_s):
            return "no engine runs; it will be loaded when one does"
        late = time.monotonic() - wanted_at > self.settings.finetuning.ready_timeout_s
        return "the engine has not loaded it yet" if late else None

    def _write_results(self, job: Job) -> None:
        """The curve as a file that the API can hand out."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(CURVE)
        for event in read_events(self.database, job.job_id, kind="metrics", limit=100_000):
            data = event.data or {}
            values = (data.get(n) for n in ("step", "loss", "eval_loss", "mean_token_accuracy", "learning_rate"))
            writer.writerow(["" if value is None else value for value in values])
        uploads = Uploads(self.database, self.settings.files_root, job.tenant, job.workspace)
        with uploads.draft() as (path, file):
            file.write(text.getvalue().encode())
            file.flush()
            rows = text.getvalue().count("\n") - 1
            file_id, name = result_file_id(job.job_id), f"{job.job_id}-results.csv"
            uploads.keep(path, name, RESULTS_PURPOSE, format=None, rows=rows, file_id=file_id)

    def _export_usage(self) -> None:
        for tenant, seconds in self.runners.usage_s().items():
            metrics.TRAINING_SECONDS.labels(tenant).set(seconds)


class LocalProcesses:
    """Processes on this machine, each by itself: they outlive this one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.home / "finetuning"
        self.settings_file = self.folder / "settings.yaml"
        write_private(self.settings_file, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))

    def start(self, job: Job, token: str) -> dict[str, object]:
        """A process of its own session; its number."""
        return {"launched": start_detached(job_command(job, token, str(self.settings_file)), self._log(job))}

    def alive(self, job: Job) -> bool:
        """By number and time of birth here; by what it says where it runs elsewhere."""
        runner = job.runner or {}
        if "pid" not in runner:
            if "launched" in runner and not psutil.pid_exists(runner["launched"]):
                return False
            return now_us() - int(runner["claimed_at_us"]) < self.settings.finetuning.start_timeout_s * SECOND_US
        if runner["host"] != socket.gethostname():
            said_us = max(runner["claimed_at_us"], (job.progress or {}).get("at_us", 0))
            return bool(now_us() - said_us < self.settings.training.job_silent_s * SECOND_US)
        return find_process(runner["pid"], runner["created"]) is not None

    def end(self, job: Job, *, insist: bool) -> None:
        """Only the very process that reported itself."""
        runner = job.runner or {}
        if runner.get("host") != socket.gethostname():
            return  # it ends by itself when it next reports
        process = find_process(runner["pid"], runner["created"])
        if process is not None:
            kill_family(process) if insist else ask_to_end(process)

    def last_word(self, job: Job) -> str:
        """The last line of its log."""
        return last_line(self._log(job))

    def _log(self, job: Job) -> Path:
        return self.folder / job.job_id / "log"


class RayProcesses:
    """Ray jobs on the cluster whose dashboard is at `address`; its nodes see the same home."""

    def __init__(self, settings: Settings, address: str) -> None:
        self.local, self.settings, self.address = LocalProcesses(settings), settings, address

    def start(self, job: Job, token: str) -> dict[str, object]:
        """A Ray job; its id."""
        from cluster.submit import submit

        line = job_command(job, token, str(self.local.settings_file))
        return {"ray_job": submit(line, self.address, environment={}, on_text=None)}

    def alive(self, job: Job) -> bool:
        """As Ray says; a job of which Ray knows nothing any more is gone."""
        runner = job.runner or {}
        if "ray_job" not in runner:
            return now_us() - int(runner["claimed_at_us"]) < self.settings.finetuning.start_timeout_s * SECOND_US
        try:
            return not self._client().get_job_status(runner["ray_job"]).is_terminal()
        except RuntimeError as error:
            return "does not exist" not in str(error)

    def end(self, job: Job, *, insist: bool) -> None:
        """Ray asks first and insists by itself."""
        if "ray_job" in (job.runner or {}):
            self._client().stop_job((job.runner or {})["ray_job"])

    def last_word(self, job: Job) -> str:
        """Ray's own word on it."""
        if "ray_job" not in (job.runner or {}):
            return ""
        try:
            message = self._client().get_job_info((job.runner or {})["ray_job"]).message or ""
        except RuntimeError:
            return ""
        return str(message).strip().splitlines()[-1][:300] if message else ""

    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.address)


def job_command(job: Job, token: str, settings_file: str) -> list[str]:
    """The command line of a job's process."""
    return ["train", "job", job.job_id, "--token", token, "--config", settings_file]


def processes_for(settings: Settings) -> Processes:
    """As the settings say."""
    address = settings.finetuning.ray_jobs_address
    return RayProcesses(settings, address) if address else LocalProcesses(settings)


class DispatchLoop(threading.Thread):
    """Ticks until it is stopped."""

    def __init__(self, settings: Settings, connected: Callable[[Settings], Engine] = connect) -> None:
        super().__init__(name="fine-tuning", daemon=True)
        self.settings, self._connected = settings, connected
        self._stopping = threading.Event()

    def run(self) -> None:
        """The loop; a database that is away is tried again."""
        dispatcher: Dispatcher | None = None
        while not self._stopping.is_set():
            try:
                if dispatcher is None:
                    dispatcher = Dispatcher(self.settings, self._connected(self.settings))
                dispatcher.tick()
            except (RayloopError, sa.exc.SQLAlchemyError, OSError) as error:
                log.warning("no fine-tuning job moves: %s", str(error).splitlines()[0])
            except Exception:
                log.exception("a pass over the fine-tuning jobs failed")
            self._stopping.wait(self.settings.finetuning.tick_s)

    def stop(self) -> None:
        """End after the pass under way; the jobs' processes go on."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=10)
