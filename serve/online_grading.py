"""Grades a sample of live traffic after the answers left, by reading the log like everybody else.

A sampled answer is graded and looked at by the detectors (`serve.online_detectors`); a live answer whose copy went to
a shadow is compared with the shadow's (`serve.online_pairs`).

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
from data.grading.types import Grader
from data.log import EventLog, save_cursor
from serve.grading import Grading
from serve.online_detectors import OnlineDetectors
from serve.online_pairs import OnlinePairs
from serve.online_samples import grade_event, has_answer, item_of, sample_of

log = logging.getLogger(__name__)

CURSOR = LEASE = "online-grading"
LEASE_S = 30.0
PURGE_EVERY = 1_000  # rounds between two looks for judges' grades that are too old
GRADED_ARMS = ("stable", "candidate", "none")
"""Whose answers are graded by themselves; a shadow's are compared with the live ones."""
KINDS = ("interaction", "shadow.pair")


class OnlineGrading:
    """The loop of one grader replica. Off unless learning and capture are on, and there is something to grade with."""

    def __init__(self, settings: Settings, database: Engine) -> None:
        self._settings = online = settings.grader.online
        graded = online.grader is not None or online.pair_grader is not None or online.detectors
        self._on = settings.learning.enabled and settings.capture.enabled and graded
        self._database, self._log = database, EventLog(database)
        self._detectors = OnlineDetectors(settings.curation.detectors) if online.detectors else None
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
            except Exception:  # a defect must not end the loop without a word
                log.exception("live answers are not graded for now")
                more = False
            if not more:
                await asyncio.sleep(self._settings.interval_s)

    async def _leads(self) -> bool:
        return await asyncio.to_thread(acquire_lease, self._database, LEASE, self._holder, LEASE_S, now_us())

    async def round(self, grading: Grading) -> bool:
        """Grade what the log holds since last time; true when there may be more.

        Raises:
            InputError: `grader.online.grader` or `grader.online.pair_grader` describes no grader.
        """
        online = self._settings
        grader = None if online.grader is None else await grading.grader(online.grader)
        pairs = await self._pairs(grading, grader)
        after = await asyncio.to_thread(self._log.cursor, CURSOR)
        batch = await asyncio.to_thread(self._log.read, after, online.batch, kinds=KINDS)
        if not batch:
            return False
        chosen = [recorded.event for recorded in batch if sampled(recorded, online.share)]
        deadline = asyncio.get_running_loop().time() + online.deadline_s
        made = await asyncio.gather(
            *[self._grade(grading, grader, event, deadline) for event in chosen if grader is not None],
            *[pairs.compare(r.event, deadline) for r in batch if pairs and pair_sampled(r, online.pair_share)],
        )
        grades = [grade for grade in made if grade is not None]
        if self._detectors is not None:
            grades += await asyncio.to_thread(self._detectors.look_at, chosen)
        await asyncio.to_thread(self._record, grades, batch[-1].seq)
        return len(batch) == online.batch

    async def _pairs(self, grading: Grading, grader: Grader | None) -> OnlinePairs | None:
        config = self._settings.pair_grader
        comparing = grader if config is None else await grading.grader(config)
        return None if comparing is None else OnlinePairs(self._log, grading, comparing)

    async def _grade(self, grading: Grading, grader: Grader, event: Event, deadline: float) -> Event:
        result = await grading.grade(grader, item_of(event), sample_of(event), deadline)
        metrics.ONLINE_GRADES.labels("graded" if result.reward is not None else "abstained").inc()
        return grade_event(event, grader, result)

    def _record(self, grades: Sequence[Event], seq: int) -> None:
        with write(self._database).begin() as connection:
            self._log.append_in(connection, grades)
            save_cursor(connection, CURSOR, seq)


def sampled(recorded: RecordedEvent, share: float) -> bool:
    """Whether an interaction is in the sample: it has an answer, and its hash is low enough."""
    event = recorded.event
    if recorded.erased or event.kind != "interaction" or event.body.get("arm") not in GRADED_ARMS:
        return False
    return has_answer(event) and _drawn("grade", event, share)


def pair_sampled(recorded: RecordedEvent, share: float) -> bool:
    """Whether an event is of a shadow pair that is compared."""
    return not recorded.erased and recorded.event.kind == "shadow.pair" and _drawn("pair", recorded.event, share)


def _drawn(purpose: str, event: Event, share: float) -> bool:
    """All reports of an interaction are drawn, or none: one of them is the one that counts."""
    return zlib.crc32(f"{purpose}:{event.interaction_id or event.event_id}".encode()) < share * 2**32
