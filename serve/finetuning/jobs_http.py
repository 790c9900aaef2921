"""`/v1/fine_tuning/jobs`: create, list, retrieve, pause, resume, cancel, events, checkpoints.

A request changes the job table and nothing else; `serve.finetuning.dispatcher` starts and ends processes. So a
router may be restarted at any time, and any router answers for any job.
"""

import asyncio
import builtins
import hashlib
import time
import uuid
from dataclasses import dataclass
from itertools import islice

import orjson
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, NotFoundError
from cluster.job_events import JobEvent, Kind, note, read_events
from cluster.jobs import Job, Jobs
from cluster.quota import exceeded
from cluster.settings import Settings
from data.finetuning.rows import Json, check_against_grader
from data.finetuning.uploads import StoredFile, Uploads
from serve.finetuning import requests
from serve.finetuning.objects import (
    ENDED,
    checkpoint_object,
    event_object,
    job_object,
    number_of,
    page,
    status_of,
)
from serve.keys import Key
from serve.openai import ApiError, Headers, Receive, Scope, Send, text_header
from serve.query import Query
from serve.snapshot import Snapshot

MAX_PAGE = 100
DEFAULT_PAGE = 20
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
ACTED = {
    "pause": "The job was paused",
    "resume": "The job goes on",
    "cancel": "The job was cancelled",
}


@dataclass(slots=True)
class JobRoutes:
    """The routes of one router."""

    settings: Settings

    def jobs(self, database: Engine, key: Key) -> Jobs:
        """The jobs that a key may see."""
        return Jobs(database, key.tenant, key.workspace)

    async def create(self, database: Engine, key: Key, snapshot: Snapshot, scope: Scope, document: Json) -> Json:
        """A new job, waiting to be started."""
        base = requests.resolve_model(document.get("model"), snapshot, key.tenant, self.settings)
        repeat = text_header(scope, b"idempotency-key")
        return await asyncio.to_thread(self._create, database, key, base, document, repeat)

    def _create(self, database: Engine, key: Key, base: requests.Base, document: Json, repeat: str | None) -> Json:
        settings, jobs = self.settings, self.jobs(database, key)
        job_id = _job_id(key, repeat)
        asked = requests.parse_create(document, settings)
        files = self._files(database, key, document, asked["method"])
        self._check_quota(jobs)
        request = asked | files | {
            "model": document["model"],
            "base": base.ref,
            "agent": base.agent or f"ft-{key.tenant}",
            "served_as": requests.served_name(base, key.tenant, asked["suffix"], job_id),
            "training": requests.METHODS[asked["method"]["type"]],
        }  # fmt: skip
        try:
            job = jobs.create(
                request["training"],
                agent=request["agent"],
                job_id=job_id,
                request=request,
                max_active=settings.finetuning.max_active_jobs,
            )
        except ConflictError:
            if repeat is None:
                raise
            return job_object(jobs.get(job_id))
        note(database, job_id, f"Created fine-tuning job: {job_id}")
        return job_object(job)

    def _files(self, database: Engine, key: Key, document: Json, method: Json) -> Json:
        uploads = Uploads(database, self.settings.files_root, key.tenant, key.workspace)
        names = {field: document.get(field) for field in ("training_file", "validation_file")}
        stored: dict[str, StoredFile] = {}
        for field, name in names.items():
            if name is None and field == "validation_file":
                continue
            try:
                stored[field] = uploads.get(requests.file_id(field, name))
            except NotFoundError:
                message = f"{field}: there is no file {name!r}; upload it with purpose fine-tune."
                raise ApiError(400, message, code="invalid_file", param=field) from None
        requests.check_files(method, stored["training_file"], stored.get("validation_file"), self.settings)
        if method["type"] == "reinforcement":
            check = requests.item_check(method["reinforcement"]["grader"])
            for found in stored.values():
                check_against_grader(uploads.path(found), check)
        return names

    def _check_quota(self, jobs: Jobs) -> None:
        message = exceeded(self.settings, jobs)
        if message is not None:
            raise ApiError(429, message, code="insufficient_quota", type="insufficient_quota", retry=False)

    async def list(self, database: Engine, key: Key, query: Query) -> Json:
        """One page, the newest first."""
        limit, after = query.number("limit", DEFAULT_PAGE, MAX_PAGE), query.text("after")
        metadata, jobs = query.mapping("metadata"), self.jobs(database, key)
        found = await asyncio.to_thread(lambda: list(islice(jobs.requested(after=after, metadata=metadata), limit + 1)))
        return page([job_object(job) for job in found[:limit]], has_more=len(found) > limit)

    async def retrieve(self, database: Engine, key: Key, job_id: str) -> Json:
        """One job."""
        return job_object(await asyncio.to_thread(self._get, database, key, job_id))

    async def act(self, database: Engine, key: Key, job_id: str, action: str) -> Json:
        """Pause, resume or cancel; the job's new state."""
        await asyncio.to_thread(self._get, database, key, job_id)
        jobs = self.jobs(database, key)
        deadline = time.monotonic() + self.settings.finetuning.resume_wait_s
        while action == "resume" and _is_ending(await asyncio.to_thread(jobs.get, job_id)):
            if time.monotonic() > deadline:
                message = f"The process of job {job_id} has not ended yet; try again in a moment."
                raise ApiError(409, message, code="still_stopping", retry_after_s=self.settings.serve.retry_after_s)
            await asyncio.sleep(self.settings.finetuning.event_poll_s)
        job = await asyncio.to_thread(getattr(jobs, action), job_id)
        await asyncio.to_thread(note, database, job_id, ACTED[action])
        return job_object(job)

    async def events(self, database: Engine, key: Key, job_id: str, query: Query) -> Json:
        """One page of events, the newest first."""
        found, more, _ = await self._page(database, key, job_id, query, None)
        return page([event_object(event) for event in found], has_more=more)

    async def checkpoints(self, database: Engine, key: Key, job_id: str, query: Query) -> Json:
        """One page of checkpoints, the newest first."""
        found, more, job = await self._page(database, key, job_id, query, "checkpoint")
        return page([checkpoint_object(event, job) for event in found], has_more=more)

    async def _page(
        self, database: Engine, key: Key, job_id: str, query: Query, kind: Kind | None
    ) -> tuple[builtins.list[JobEvent], bool, Job]:
        job = await asyncio.to_thread(self._get, database, key, job_id)
        limit = query.number("limit", DEFAULT_PAGE if kind is None else 10, MAX_PAGE)
        before = _cursor(query)
        found = await asyncio.to_thread(
            lambda: read_events(database, job_id, before=before, kind=kind, limit=limit + 1, newest_first=True)
        )
        return found[:limit], len(found) > limit, job

    async def stream(
        self, database: Engine, key: Key, job_id: str, query: Query, receive: Receive, send: Send, headers: Headers
    ) -> None:
        """Events as they come, the oldest first, until the job has ended or the client left."""
        job = await asyncio.to_thread(self._get, database, key, job_id)
        after, quiet = _cursor(query) or 0, 0
        await receive()  # the end of the request; what comes next is the client's leave
        gone = asyncio.ensure_future(receive())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM, *headers]})
            while not gone.done():
                job = await asyncio.to_thread(self._get, database, key, job_id)
                found = await asyncio.to_thread(lambda: read_events(database, job_id, after=after))  # noqa: B023
                text = b"".join(b"data: " + orjson.dumps(event_object(event)) + b"\n\n" for event in found)
                after = found[-1].number if found else after
                quiet = 0 if found or status_of(job) not in ENDED else quiet + 1
                ended = quiet > 1  # what a job says of its end may come after the end
                text += b"data: [DONE]\n\n" if ended else b""
                await send({"type": "http.response.body", "body": text, "more_body": not ended})
                if ended:
                    return
                if not found:
                    await asyncio.wait([gone], timeout=self.settings.finetuning.event_poll_s)
        finally:
            gone.cancel()

    def _get(self, database: Engine, key: Key, job_id: str) -> Job:
        job = self.jobs(database, key).get(job_id)
        if job.request is None:
            raise NotFoundError(f"no fine-tuning job {job_id!r}")
        return job


def _is_ending(job: Job) -> bool:
    """Paused or failed, and its process is still there."""
    return job.state in ("paused", "failed") and job.runner is not None


def _cursor(query: Query) -> int | None:
    after = query.text("after")
    if after is None:
        return None
    number = number_of(after)
    if number is None:
        raise ApiError(400, f"after names no event: {after[:80]!r}.", code="invalid_value", param="after")
    return number


def _job_id(key: Key, repeat: str | None) -> str:
    """A new id; the same one for the same idempotency key of a tenant."""
    if repeat is None:
        return f"ftjob-{uuid.uuid4().hex[:24]}"
    digest = hashlib.sha256(f"{key.tenant}\0{key.workspace}\0{repeat}".encode()).hexdigest()
    return f"ftjob-{digest[:24]}"
