"""Events leave the log: each outlet reads it behind a cursor of its own and delivers in order.

An event counts as delivered when its receiver has said so; then the cursor moves, in the database. A process
that dies in between delivers that event, or that page to a broker, again: at least once, with the same id, by
which the receiver can tell. A receiver that fails is tried again after a growing pause and holds up nobody else.
What it refuses for good, or fails for too often, is put aside as a dead letter and can be sent later.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster import metrics
from cluster.clock import SECOND_US, now_us, to_iso
from cluster.database import write
from cluster.errors import ConflictError, NotFoundError
from cluster.settings.outlets import OutletSettings
from cluster.tables import dead_letters, outlets
from cluster.webhook import DeliveryError
from data.events import Event, RecordedEvent
from data.log import EventLog
from data.scrub_text import Placeholders, scrub_value

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 3600.0


class Sink(Protocol):
    """Where an outlet's events go."""

    @property
    def at_once(self) -> int:
        """How many events one `send` takes."""

    def send(self, batch: Sequence[RecordedEvent]) -> None:
        """Deliver a batch, in order; it has arrived when this returns.

        Raises:
            DeliveryError: with how many had arrived, and what to do about the next.
        """

    def close(self) -> None:
        """Let go of what is held."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One outlet as configured."""

    name: str
    """`outlet:<name>` or `notify:<name>`."""
    kinds: tuple[str, ...]
    """Empty: all."""
    open: Callable[[], Sink]
    tenant: str | None = None
    start: Literal["now", "beginning"] = "now"
    wants: Callable[[RecordedEvent], bool] = lambda recorded: not recorded.erased


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an outlet is: a row of `outlets`."""

    name: str
    seq: int
    """Everything up to here is delivered, not wanted, or a dead letter."""
    delivered: int
    attempts: int
    """Failures of the next event so far."""
    retry_at_us: int
    failure: str | None
    """Why the latest attempt failed; `None` once one succeeds."""
    updated_at_us: int


class Outlet:
    """Delivers the events of one plan. One process at a time should do so; two deliver things twice, no worse."""

    def __init__(self, plan: Plan, engine: Engine, settings: OutletSettings, clock: Callable[[], int] = now_us) -> None:
        self.plan, self._engine, self._settings, self._clock = plan, engine, settings, clock
        self._log = EventLog(engine)
        self.sink = plan.open()

    def step(self, hold: Callable[[], bool] = lambda: True) -> float:
        """Deliver a page; returns the seconds until there may be more to do.

        `hold` is asked before each delivery and says whether this process may still act.

        Raises:
            ConflictError: another process delivers for this outlet.
        """
        progress = self.progress()
        wait_us = progress.retry_at_us - self._clock()
        if wait_us > 0:
            return wait_us / SECOND_US
        page = self._log.read(progress.seq, self._settings.page_events, kinds=self.plan.kinds, tenant=self.plan.tenant)
        for part, wanted in self._slices(page):
            if not hold():
                break
            progress = self._deliver(progress, part, wanted)
            if progress.attempts:
                break
        return 0.0 if page else self._settings.poll_s

    def progress(self) -> Progress:
        """How far it is; a new outlet begins where its plan says."""
        known = read_progress(self._engine, self.plan.name)
        if known:
            return known[0]
        seq = self._log.last_seq() if self.plan.start == "now" else 0
        row = Progress(self.plan.name, seq, 0, 0, 0, None, self._clock())
        try:
            with write(self._engine).begin() as connection:
                connection.execute(outlets.insert().values(_row(row)))
        except sa.exc.IntegrityError:  # another process was first
            return read_progress(self._engine, self.plan.name)[0]
        return row

    def measure(self) -> None:
        """Bring the gauges up to date: what waits, and what was put aside."""
        metrics.OUTLET_WAITING.labels(self.plan.name).set(waiting(self._engine, self.plan, self.progress().seq))
        metrics.DEAD_LETTERS.labels(self.plan.name).set(count_dead_letters(self._engine, self.plan.name))

    def _slices(self, page: Sequence[RecordedEvent]) -> Iterator[tuple[list[RecordedEvent], list[RecordedEvent]]]:
        """The page in parts, each with the events in it that are wanted: as many as the sink takes at once."""
        part: list[RecordedEvent] = []
        wanted: list[RecordedEvent] = []
        for recorded in page:
            part.append(recorded)
            if self.plan.wants(recorded):
                wanted.append(recorded)
            if len(wanted) == self.sink.at_once:
                yield part, wanted
                part, wanted = [], []
        if part:
            yield part, wanted

    def _deliver(self, progress: Progress, part: list[RecordedEvent], wanted: list[RecordedEvent]) -> Progress:
        try:
            if wanted:
                self.sink.send(wanted)
        except DeliveryError as error:
            if error.delivered:
                progress = self._move(progress, wanted[error.delivered - 1].seq, error.delivered)
            return self._failed(progress, wanted[error.delivered], error)
        return self._move(progress, part[-1].seq, len(wanted))

    def _move(self, progress: Progress, seq: int, delivered: int) -> Progress:
        metrics.DELIVERED.labels(self.plan.name).inc(delivered)
        moved = replace(progress, seq=seq, delivered=progress.delivered + delivered, attempts=0, retry_at_us=0)
        return self._save(progress, replace(moved, failure=None))

    def _failed(self, progress: Progress, recorded: RecordedEvent, error: DeliveryError) -> Progress:
        attempts, now = progress.attempts + 1, self._clock()
        reason = str(error)[:1000]
        if self._gives_up(recorded, attempts, error, now):
            metrics.DELIVERY_FAILURES.labels(self.plan.name, "dead").inc()
            log.warning("%s: event %d is put aside: %s", self.plan.name, recorded.seq, reason)
            buried = replace(progress, seq=recorded.seq, attempts=0, retry_at_us=0, failure=reason)
            return self._save(progress, buried, _letter(self.plan.name, recorded, reason, attempts, now))
        metrics.DELIVERY_FAILURES.labels(self.plan.name, "retry").inc()
        settings = self._settings
        pause_s = min(settings.retry_first_s * 2.0 ** (attempts - 1), settings.retry_max_s)
        pause_s = min(max(pause_s, error.retry_after_s or 0.0), LONGEST_PAUSE_S)
        if attempts == 1:
            log.warning("%s: event %d was not delivered and is tried again: %s", self.plan.name, recorded.seq, reason)
        retry_at_us = now + round(pause_s * SECOND_US)
        return self._save(progress, replace(progress, attempts=attempts, retry_at_us=retry_at_us, failure=reason))

    def _gives_up(self, recorded: RecordedEvent, attempts: int, error: DeliveryError, now: int) -> bool:
        if error.how == "refused":
            return True
        if error.how == "failed":
            return attempts >= self._settings.max_attempts
        return now - recorded.recorded_at_us > self._settings.give_up_after_s * SECOND_US

    def _save(self, before: Progress, after: Progress, letter: dict[str, Any] | None = None) -> Progress:
        after = replace(after, updated_at_us=self._clock())
        unchanged = (outlets.c.name == before.name) & (outlets.c.seq == before.seq)
        with write(self._engine).begin() as connection:
            if not connection.execute(outlets.update().where(unchanged).values(_row(after))).rowcount:
                raise ConflictError(f"{before.name} was moved by another process")
            if letter is not None:
                _bury(connection, letter)
        return after


def _row(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in Progress.__slots__}


def _letter(outlet: str, recorded: RecordedEvent, reason: str, attempts: int, at_us: int) -> dict[str, Any]:
    event = recorded.event
    return {
        "outlet": outlet,
        "seq": recorded.seq,
        "event_id": event.event_id,
        "kind": event.kind,
        "tenant": event.tenant,
        "reason": reason,
        "attempts": attempts,
        "died_at_us": at_us,
    }


def _bury(connection: Connection, letter: dict[str, Any]) -> None:
    same = (dead_letters.c.outlet == letter["outlet"]) & (dead_letters.c.seq == letter["seq"])
    connection.execute(dead_letters.delete().where(same))
    connection.execute(dead_letters.insert().values(letter))


def read_progress(engine: Engine, name: str | None = None) -> list[Progress]:
    """How far each outlet is that has ever run, or the one of this name."""
    query = sa.select(outlets).order_by(outlets.c.name)
    if name is not None:
        query = query.where(outlets.c.name == name)
    with engine.connect() as connection:
        return [Progress(**row) for row in connection.execute(query).mappings()]


def waiting(engine: Engine, plan: Plan, seq: int) -> int:
    """Events of the plan's kinds behind `seq`, wanted or not."""
    from cluster.tables import events

    query = sa.select(sa.func.count()).where(events.c.seq > seq)
    if plan.kinds:
        query = query.where(events.c.kind.in_(plan.kinds))
    if plan.tenant is not None:
        query = query.where(events.c.tenant == plan.tenant)
    with engine.connect() as connection:
        return connection.execute(query).scalar_one()


def read_dead_letters(engine: Engine, outlet: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
    """Dead letters, oldest event first."""
    query = sa.select(dead_letters).order_by(dead_letters.c.outlet, dead_letters.c.seq).limit(limit)
    if outlet is not None:
        query = query.where(dead_letters.c.outlet == outlet)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def count_dead_letters(engine: Engine, outlet: str) -> int:
    """How many an outlet has."""
    query = sa.select(sa.func.count()).where(dead_letters.c.outlet == outlet)
    with engine.connect() as connection:
        return connection.execute(query).scalar_one()


def resend(engine: Engine, outlet: str, sink: Sink, seq: int) -> None:
    """Deliver a dead letter now; it is one no longer when that succeeds.

    Raises:
        NotFoundError: there is no such letter, or its event has been erased.
        DeliveryError: it was not delivered and stays.
    """
    if not any(letter["seq"] == seq for letter in read_dead_letters(engine, outlet)):
        raise NotFoundError(f"{outlet} has no dead letter {seq}; see `rayloop outlets dead`")
    found = EventLog(engine).read(seq - 1, 1)
    if not found or found[0].seq != seq or found[0].erased:
        raise NotFoundError(f"event {seq} is no longer in the log; `rayloop outlets drop` forgets its letter")
    sink.send(found)
    drop(engine, outlet, seq)


def drop(engine: Engine, outlet: str, seq: int) -> None:
    """Forget a dead letter."""
    with write(engine).begin() as connection:
        where = (dead_letters.c.outlet == outlet) & (dead_letters.c.seq == seq)
        connection.execute(dead_letters.delete().where(where))


def message_id(event: Event) -> str:
    """The id a receiver tells deliveries apart by; printable ASCII."""
    return quote(f"{event.tenant}/{event.event_id}", safe="/:.-_~")


def document(recorded: RecordedEvent, *, scrubbed: bool) -> dict[str, Any]:
    """An event as it leaves."""
    event = recorded.event
    body = scrub_value(event.body, Placeholders()) if scrubbed else event.body
    return {
        "type": event.kind,
        "id": message_id(event),
        "seq": recorded.seq,
        "tenant": event.tenant,
        "workspace": event.workspace,
        "occurred_at": to_iso(event.occurred_at_us),
        "recorded_at": to_iso(recorded.recorded_at_us),
        "user_id": event.user_id,
        "session_id": event.session_id,
        "agent": event.agent,
        "interaction_id": event.interaction_id,
        "body": body,
    }
