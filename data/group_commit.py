"""Gathers what many threads and coroutines append to the log into few transactions.

One thread writes. A group is written when enough events wait, or when the oldest has waited long enough
(`log.group_commit_events`, `log.group_commit_ms`); whatever else arrived meanwhile goes with it. A future
answers only when its events are on disk. From asyncio: `await asyncio.wrap_future(commit.submit(events))`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

import sqlalchemy as sa
import stamina

from cluster import metrics
from cluster.errors import OverloadedError, UnavailableError
from cluster.settings.capture import LogSettings
from data.events import Event
from data.log import EventLog, Verdict

log = logging.getLogger(__name__)

Transient = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
"""Errors of a database that is locked, restarting or out of reach: the same write may pass later."""


@dataclass(frozen=True, slots=True)
class Submission:
    """Events that are answered together."""

    events: Sequence[Event]
    future: "Future[list[Verdict]]" = field(default_factory=Future)
    at: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class CommitCounts:
    """Totals since the start, for metrics."""

    events: int = 0
    transactions: int = 0
    refused: int = 0
    """Events turned away because the queue was full."""
    failed: int = 0
    """Events whose transaction failed for good."""


class GroupCommit:
    """The one writer of this process. Close it, or use it as a context manager."""

    def __init__(
        self, event_log: EventLog, settings: LogSettings, on_refused: Callable[[int], Event] | None = None
    ) -> None:
        """`on_refused`: the event to append when the queue, having been full, has turned so many events away."""
        self.log = event_log
        self.counts = CommitCounts()
        self._settings = settings
        self._on_refused, self._unsaid = on_refused, 0
        self._queue: deque[Submission] = deque()
        self._waiting = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    @property
    def waiting_events(self) -> int:
        """Events that wait for a commit."""
        return self._waiting

    def submit(self, events: Sequence[Event]) -> "Future[list[Verdict]]":
        """Queue events; the future gives one verdict an event, in order, once they are durable.

        The future fails with `UnavailableError` when the database stays out of reach, or with the
        database's own error when it refuses these events; the events are then not in the log, unless
        the connection broke during the commit itself: submit the same events again, ids make that safe.

        Raises:
            OverloadedError: too many events wait already.
            UnavailableError: the log is closed.
        """
        submission = Submission(events)
        if not events:
            submission.future.set_result([])
            return submission.future
        with self._changed:
            self._admit(len(events))
            self._queue.append(submission)
            self._waiting += len(events)
            if len(self._queue) == 1 or self._waiting >= self._settings.group_commit_events:
                self._changed.notify()
        return submission.future

    def append(self, events: Sequence[Event]) -> list[Verdict]:
        """`submit`, and wait for it."""
        return self.submit(events).result()

    def close(self) -> None:
        """Write what waits, answer every future, stop. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self, count: int) -> None:
        limit = self._settings.queue_events
        if self._closing:
            raise UnavailableError("the event log is closing; send the events again to a running server")
        if self._waiting + count > limit:
            self.counts.refused += count
            self._unsaid += count
            metrics.EVENTS_REFUSED.inc(count)
            raise OverloadedError(
                f"{self._waiting} events wait for the log and {count} more would pass "
                f"log.queue_events={limit}; try again later",
                self._settings.retry_after_s,
            )

    def _run(self) -> None:
        while group := self._next_group():
            self._commit(group)

    def _next_group(self) -> list[Submission]:
        """The submissions of the next transaction; empty at the end."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            self._linger()
            return self._take()

    def _take(self) -> list[Submission]:
        """What waits, up to the limit of one transaction but at least one submission."""
        group: list[Submission] = []
        count, limit = 0, self._settings.group_commit_max_events
        while self._queue and (not group or count + len(self._queue[0].events) <= limit):
            group.append(self._queue.popleft())
            count += len(group[-1].events)
        self._waiting -= count
        metrics.EVENTS_WAITING.set(self._waiting)
        if group and self._unsaid and self._on_refused is not None:
            group.append(Submission([self._on_refused(self._unsaid)]))
            self._unsaid = 0
        return group

    def _linger(self) -> None:
        """Wait until the group is full or its oldest event has waited long enough."""
        while self._queue and not self._closing and self._waiting < self._settings.group_commit_events:
            remaining_s = self._queue[0].at + self._settings.group_commit_ms / 1000 - time.monotonic()
            if remaining_s <= 0:
                return
            self._changed.wait(remaining_s)

    def _commit(self, group: list[Submission]) -> None:
        try:
            verdicts = iter(self._append([event for submission in group for event in submission.events]))
        except Exception as error:
            self._failed(group, error)
            return
        for submission in group:
            _answer(submission, [next(verdicts) for _ in submission.events])

    def _append(self, events: list[Event]) -> list[Verdict]:
        retry_for_s = self._settings.retry_for_s
        for attempt in stamina.retry_context(Transient, attempts=None, timeout=retry_for_s, wait_max=1.0):
            with attempt:
                verdicts = self.log.append(events)
        self.counts.transactions += 1
        self.counts.events += len(events)
        return verdicts

    def _failed(self, group: list[Submission], error: Exception) -> None:
        """One submission can spoil a group: then each is tried alone, and only the bad one fails."""
        if len(group) > 1 and not isinstance(error, Transient):
            for submission in group:
                self._commit([submission])
            return
        count = sum(len(submission.events) for submission in group)
        self.counts.failed += count
        log.error("%d events were not written: %s", count, error)
        if isinstance(error, Transient):
            cause = str(error).splitlines()[0]
            error = UnavailableError(f"the event log takes no writes ({cause}); send the events again")
        for submission in group:
            if submission.future.set_running_or_notify_cancel():
                submission.future.set_exception(error)


def _answer(submission: Submission, verdicts: list[Verdict]) -> None:
    if submission.future.set_running_or_notify_cancel():
        submission.future.set_result(verdicts)
