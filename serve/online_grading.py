"""Grades a sample of live traffic after the answers left, by reading the log like everybody else.

One replica does it at a time, by a lease. What is sampled is decided by a hash of the interaction's id, and a
grade's event id by interaction and grader version, so starting again grades nothing twice.
"""

import asyncio
import logging
import os
import socket
import zlib
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster import metrics
from cluster.clock import now_us
from cluster.database import write
from cluster.errors import RayloopError
from cluster.lease import acquire_lease, release_lease
from cluster.settings import Settings
from data.events import Event, RecordedEvent
from data.grading.types import Grader, GradeResult
from data.log import EventLog, save_cursor
from serve.grading import Grading

log = logging.getLogger(__name__)

CURSOR = LEASE = "online-grading"
LEASE_S = 30.0
PURGE_EVERY = 1_000  # rounds between two looks for judges' grades that are too old
GRADED_ARMS = ("stable", "candidate", "none")


class OnlineGrading:
    """The loop of one grader replica. Off unless learning, capture and `grader.online.grader` are on."""

    def __init__(self, settings: Settings, database: Engine) -> None:
        self._settings = settings.grader.online
        self._on = settings.learning.enabled and settings.capture.enabled and self._settings.grader is not None
        self._database, self._log = database, EventLog(database)
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"
        self._loop: asyncio.Task[None] | None = None

    def start(self, grading: Grading) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.ensure_future(self._repeat(grading))

    async def close(self) -> None:
        """Stop and give the lease back."""
        if self._loop is None:
            return
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        try:
            await asyncio.to_thread(release_lease, self._database, LEASE, self._holder)
        except sa.exc.SQLAlchemyError as error:
            log.warning("the lease of online grading was not given back (%s); it expires by itself", error)

    async def _repeat(self, grading: Grading) -> None:
        rounds = 0
        while True:
            try:
                more = self._on and await self._leads() and await self.round(grading)
                rounds += 1
                if rounds % PURGE_EVERY == 1 and grading.judged is not None:
                    await asyncio.to_thread(grading.judged.forget_old)
            except (sa.exc.SQLAlchemyError, RayloopError) as error:
                log.warning("live answers are not graded for now (%s)", str(error).splitlines()[0])
                more = False
            if not more:
                await asyncio.sleep(self._settings.interval_s)

    async def _leads(self) -> bool:
        return await asyncio.to_thread(acquire_lease, self._database, LEASE, self._holder, LEASE_S, now_us())

    async def round(self, grading: Grading) -> bool:
        """Grade what the log holds since last time; true when there may be more.

        Raises:
            InputError: `grader.online.grader` describes no grader.
        """
        grader = await grading.grader(self._settings.grader)
        after = await asyncio.to_thread(self._log.cursor, CURSOR)
        batch = await asyncio.to_thread(self._log.read, after, self._settings.batch, kinds=["interaction"])
        if not batch:
            return False
        chosen = [recorded for recorded in batch if sampled(recorded, self._settings.share)]
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        grades = await asyncio.gather(*[self._grade(grading, grader, r.event, deadline) for r in chosen])
        await asyncio.to_thread(self._record, [g for g in grades if g is not None], batch[-1].seq)
        return len(batch) == self._settings.batch

    async def _grade(self, grading: Grading, grader: Grader, event: Event, deadline: float) -> Event | None:
        body = event.body
        answer = body["response"]
        item = {"messages": body["messages"], "tools": body.get("tools"), "agent": event.agent}
        sample = {"output_text": answer.get("content") or "", "output_tools": answer.get("tool_calls") or []}
        result = await grading.grade(grader, item, sample, deadline)
        metrics.ONLINE_GRADES.labels("graded" if result.reward is not None else "abstained").inc()
        return grade_event(event, grader, result)

    def _record(self, grades: Sequence[Event], seq: int) -> None:
        with write(self._database).begin() as connection:
            self._log.append_in(connection, grades)
            save_cursor(connection, CURSOR, seq)


def sampled(recorded: RecordedEvent, share: float) -> bool:
    """Whether an interaction is in the sample: it has an answer, and its hash is low enough."""
    body = recorded.event.body
    if recorded.erased or body.get("arm") not in GRADED_ARMS or not isinstance(body.get("response"), dict):
        return False
    if not isinstance(body["response"].get("content"), str):
        return False
    return zlib.crc32(b"grade:" + recorded.event.event_id.encode()) < share * 2**32


def grade_event(event: Event, grader: Grader, result: GradeResult) -> Event:
    """The grade of an interaction as an event."""
    body = {
        "grader": grader.name,
        "grader_version": result.grader_version or grader.version,
        "score_card": result.score_card,
        "reason": result.reason[:2_000],
    } | ({} if result.reward is None else {"reward": result.reward})
    return Event(
        kind="grade",
        tenant=event.tenant,
        workspace=event.workspace,
        body=body,
        event_id=f"grade:{grader.version}:{event.event_id}"[:128],
        user_id=event.user_id,
        session_id=event.session_id,
        agent=event.agent,
        interaction_id=event.interaction_id,
    )
