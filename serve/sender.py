"""A bounded queue and one thread that brings recorded items to where they belong: the client's way out.

`Sender.put` never waits: an item is queued, or dropped and counted where the queue is full. The thread sends
batches, scrubbed there, and settles each item by the service's own verdict. A service that fails is left alone
by a circuit breaker; what waits stays, within the bounds, until it returns. At all times

    recorded = accepted + duplicate + rejected + dropped + waiting

The standard library only, until the first batch is scrubbed.
"""

import json
import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.breaker import Breaker, Permit
from serve.delivery import Delivery, RefusedError, Verdicts
from serve.remote import UnreachableError

log = logging.getLogger("serve.client")

Item = dict[str, Any]
Drop = Literal["queue_full", "too_large", "unreadable", "not_scrubbed", "unsent_at_exit", "closed"]
MAX_PAUSE_S = 60.0
IDS = frozenset({"event_id", "interaction_id", "user", "session", "agent", "occurred_at", "trace_id", "type"})
"""Fields of an item that are not text. The service puts a pseudonym for the user, so two spellings of a person
must reach it as they are."""


@dataclass(frozen=True, slots=True)
class SenderLimits:
    """Bounds of the queue and of one delivery."""

    queue_items: int = 10_000
    queue_bytes: int = 16 * 2**20
    """Bytes of JSON that may wait; what is being sent counts."""
    item_bytes: int = 1_000_000
    batch_items: int = 100
    batch_bytes: int = 1_000_000
    linger_s: float = 0.5
    """How long a batch may grow."""
    timeout_s: float = 5.0
    """Longest silence of the service within one delivery."""
    retry_s: float = 0.5
    """Pause after a failure that does not open the breaker."""
    exit_s: float = 2.0
    """What the end of the process may cost."""
    consecutive: int = 3
    """Failures in a row that open the breaker."""
    window: int = 20
    window_share: float = 0.5
    half_open_s: float = 15.0
    """How long an open breaker waits before it tries again."""


@dataclass(slots=True)
class _Entry:
    payload: bytes
    size: int
    scrubbed: bool = False


class Sender:
    """The queue and its thread, which starts with the first item. Thread-safe; survives a fork."""

    def __init__(self, deliver: Delivery, limits: SenderLimits, *, scrub: bool = True) -> None:
        self._deliver, self._limits, self._scrub = deliver, limits, scrub
        self._reset()
        _senders.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._queues: dict[str, deque[_Entry]] = {}
        self._bytes = self._waiting = 0
        self._oldest = 0.0
        self._settled: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._recorded = 0
        self._breaker = Breaker(self._limits)
        self._permit: Permit = 0
        """Of the batch that is being handed over."""
        self._not_before = 0.0
        self._warned: set[str] = set()
        self._flushing = self._closed = self._abandoned = False
        self._thread: threading.Thread | None = None

    # the agent's side

    def put(self, path: str, item: Item) -> bool:
        """Queue an item; `False` where it was dropped. Never waits and never raises."""
        try:
            payload = encode(item)
        except Exception:  # whatever an agent's own objects do, its answer must not suffer
            return self._drop("unreadable")
        limits = self._limits
        if len(payload) > limits.item_bytes:
            return self._drop("too_large")
        with self._changed:
            if self._closed:
                return self._drop("closed")
            if self._waiting >= limits.queue_items or self._bytes + len(payload) > limits.queue_bytes:
                return self._drop("queue_full")
            self._recorded += 1
            if not self._waiting:
                self._oldest = time.monotonic()
            self._queues.setdefault(path, deque()).append(_Entry(payload, len(payload)))
            self._waiting += 1
            self._bytes += len(payload)
            if self._thread is None:
                self._start()
            if self._waiting == 1 or self._waiting >= limits.batch_items:
                self._changed.notify_all()
        return True

    def _drop(self, reason: Drop) -> bool:
        with self._changed:
            self._recorded += 1
            self._dropped[reason] += 1
        if reason != "closed":
            topic = "outage" if reason == "queue_full" else reason
            self._warn(topic, "%s: an item was dropped; `stats()` counts what is lost", reason)
        return False

    def _warn(self, topic: str, message: str, *arguments: object) -> None:
        """Once a topic, until the trouble is over."""
        with self._changed:
            told = topic in self._warned
            self._warned.add(topic)
        if not told:
            log.warning(message, *arguments)

    def stats(self) -> dict[str, Any]:
        """What became of everything recorded: numbers of items, and of drops by reason."""
        with self._changed:
            return {
                "recorded": self._recorded,
                "accepted": self._settled["accepted"],
                "duplicate": self._settled["duplicate"],
                "rejected": self._settled["rejected"],
                "dropped": self._dropped.total(),
                "waiting": self._waiting,
                "waiting_bytes": self._bytes,
                "dropped_by_reason": dict(self._dropped),
                "breaker_open": self._breaker.is_open,
            }

    def flush(self, timeout_s: float) -> bool:
        """Send what waits without lingering; `True` when nothing waits any more."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._waiting, timeout_s)
            self._flushing = False
            return done

    def close(self) -> None:
        """Send what can be sent in `exit_s`; the rest is counted. A service that is down costs nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(self._limits.exit_s)
        with self._changed:
            self._abandoned = True  # what a delivery under way comes to is not counted any more
            lost, self._waiting, self._bytes = self._waiting, 0, 0
            self._queues.clear()
            self._dropped["unsent_at_exit"] += lost
        if lost:
            self._tell_lost(lost)

    def _tell_lost(self, lost: int) -> None:
        level = logging.INFO if self._warned else logging.WARNING
        log.log(level, "%d items were not sent before the process ended", lost)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="rayloop-sender", daemon=True)
        self._thread.start()
        if "multiprocessing" in sys.modules:  # a multiprocessing child runs these, and no atexit
            from multiprocessing.util import Finalize

            Finalize(self, Sender.close, args=(self,), exitpriority=10)

    # the thread's side

    def _run(self) -> None:
        while taken := self._next_batch():
            path, batch = taken
            try:
                self._hand_over(path, batch)
            except Exception:  # a defect here must not end the thread with items unaccounted for
                log.debug("a batch could not be handled", exc_info=True)
                self._forget(batch, "unreadable")

    def _next_batch(self) -> tuple[str, list[_Entry]] | None:
        """Wait for a batch; `None` at the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                if self._closed and (not self._waiting or self._breaker.is_open):
                    return None
                pause_s = self._pause_s(now)
                if pause_s <= 0 and (permit := self._breaker.allow(now)) is not None:
                    self._permit = permit
                    return self._take()
                self._changed.wait(max(pause_s, 0.01) if self._waiting else None)

    def _pause_s(self, now: float) -> float:
        """How long the next batch has to wait."""
        if not self._waiting:
            return float("inf")
        hold_s = self._not_before - now
        full = self._waiting >= self._limits.batch_items or self._bytes >= self._limits.batch_bytes
        if full or self._flushing or self._closed:
            return hold_s
        return max(hold_s, self._oldest + self._limits.linger_s - now)

    def _take(self) -> tuple[str, list[_Entry]]:
        path = max(self._queues, key=lambda name: len(self._queues[name]))
        queue, batch, size = self._queues[path], list[_Entry](), 0
        while queue and len(batch) < self._limits.batch_items:
            if batch and size + queue[0].size > self._limits.batch_bytes:
                break
            batch.append(queue.popleft())
            size += batch[-1].size
        return path, batch

    def _hand_over(self, path: str, batch: list[_Entry]) -> None:
        if self._scrub:
            batch = [entry for entry in batch if self._scrubbed(entry)]
            if not batch:
                self._breaker.forget(self._permit)
                return
        try:
            verdicts = self._deliver(path, [entry.payload for entry in batch])
        except UnreachableError as error:
            self._put_back(path, batch, error)
        except RefusedError as error:
            self._refused(path, batch, error)
        else:
            self._settle(batch, verdicts)

    def _scrubbed(self, entry: _Entry) -> bool:
        """Replace personal data; an item for which that is impossible may not leave."""
        try:
            if not entry.scrubbed:
                entry.payload, entry.scrubbed = scrub(entry.payload), True
        except Exception as error:
            self._warn("not_scrubbed", "personal data cannot be scrubbed (%r), so an item is not sent", error)
            self._forget([entry], "not_scrubbed")
        return entry.scrubbed

    def _settle(self, batch: Sequence[_Entry], verdicts: Verdicts) -> None:
        with self._changed:
            self._breaker.record(self._permit, True, time.monotonic())
            self._warned.discard("outage")
            if self._leave(batch):
                self._settled.update(verdicts.statuses)
        if verdicts.problem is not None:
            self._warn("rejected", "the service rejected an item: %s; `stats()` counts them", verdicts.problem)

    def _refused(self, path: str, batch: list[_Entry], error: RefusedError) -> None:
        if error.too_long and len(batch) > 1:
            middle = len(batch) // 2
            self._hand_over(path, batch[:middle])
            self._hand_over(path, batch[middle:])
            return
        self._settle(batch, Verdicts(["rejected"] * len(batch), str(error)))

    def _put_back(self, path: str, batch: Sequence[_Entry], error: UnreachableError) -> None:
        now = time.monotonic()
        with self._changed:
            if not self._abandoned:
                self._queues.setdefault(path, deque()).extendleft(reversed(batch))
            self._breaker.record(self._permit, False, now)
            opened = self._breaker.is_open
            pause_s = self._limits.half_open_s if opened else self._limits.retry_s
            self._not_before = now + min(error.retry_after_s or pause_s, MAX_PAUSE_S)
        if opened:
            self._warn("outage", "Rayloop does not take what is recorded (%s); the agent goes on without it", error)

    def _forget(self, batch: Sequence[_Entry], reason: Drop) -> None:
        with self._changed:
            if self._leave(batch):
                self._dropped[reason] += len(batch)

    def _leave(self, batch: Sequence[_Entry]) -> bool:
        """The batch waits no more; `False` when it was counted as lost before."""
        if self._abandoned:
            return False
        self._waiting -= len(batch)
        self._bytes -= sum(entry.size for entry in batch)
        self._oldest = time.monotonic()
        self._changed.notify_all()
        return True


def encode(item: Item) -> bytes:
    """JSON of an item as it is now, so that nothing the agent changes later is recorded.

    Raises:
        ValueError: NaN, or a structure that contains itself.
    """
    text = json.dumps(item, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)
    return text.encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """What stands for an object that is not JSON."""
    dump: Callable[[], Any] | None = getattr(value, "model_dump", None)
    return dump() if callable(dump) and not isinstance(value, type) else str(value)


def scrub(payload: bytes) -> bytes:
    """The item with the personal data in its texts replaced; ids stay."""
    from data.scrub_text import Placeholders, scrub_value

    item, placeholders = json.loads(payload), Placeholders()
    clean = {name: value if name in IDS else scrub_value(value, placeholders) for name, value in item.items()}
    return encode(clean)


_senders: "weakref.WeakSet[Sender]" = weakref.WeakSet()


def _after_fork() -> None:
    """A child starts empty: its parent sends what waited, and locks may have been held at the fork."""
    for sender in list(_senders):
        sender._reset()


os.register_at_fork(after_in_child=_after_fork)
