"""What workers have to say to the command that started them, and the actor it passes through.

This module stays light: the actor's process imports it and nothing else of ours.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import RayloopError

POLL_S = 0.25  # how often the command looks into the mailbox


@dataclass(frozen=True)
class Event:
    """Something a worker has to say about one of the runs."""

    run: int
    """Place of the run in the list that was started."""
    kind: str
    """`begin`, `progress`, `checkpoint`, `end` or `fail`."""
    step: int = 0
    steps: int = 0
    values: Mapping[str, float] | None = None
    result: Mapping[str, Any] | None = None
    error: RayloopError | None = None


class Mailbox:
    """The actor between workers and command."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()

    def put(self, events: Sequence[Event]) -> None:
        """Leave events."""
        self.events.extend(events)

    def take(self) -> list[Event]:
        """All events since the last call."""
        taken = list(self.events)
        self.events.clear()
        return taken


class WorkerReporter:
    """Sends what a worker has to say to the mailbox; only rank 0 speaks.

    Steps are told together, as often as the command looks: a message costs as much as a short step.
    """

    def __init__(self, run: int, mailbox: Any, rank: int) -> None:
        self.run, self.mailbox, self.rank = run, mailbox, rank
        self.unsent: list[Event] = []
        self.sent_at = time.monotonic()

    def tell(self, kind: str, **more: Any) -> None:
        """One event, sent at once with those that wait."""
        if self.rank == 0:
            self.unsent.append(Event(self.run, kind, **more))
            self._send()

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """What one step measured."""
        if self.rank == 0:
            self.unsent.append(Event(self.run, "progress", step, steps, dict(values)))
            if time.monotonic() - self.sent_at >= POLL_S:
                self._send()

    def checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint was written."""
        self.tell("checkpoint", step=step)

    def _send(self) -> None:
        self.mailbox.put.remote(self.unsent)
        self.unsent, self.sent_at = [], time.monotonic()


@contextlib.contextmanager
def emptied_regularly(mailbox: Any, on_event: Callable[[Event], None], stop: Callable[[], None]) -> Iterator[None]:
    """Hand over events while the block runs, and the last of them when it ends.

    What `on_event` raises is raised in place of whatever the block ends with; `stop` is to make it end.
    """
    import ray

    ended = threading.Event()
    failures: list[BaseException] = []

    def empty() -> None:
        for event in ray.get(mailbox.take.remote()):
            on_event(event)

    def work() -> None:
        try:
            while not ended.wait(POLL_S):
                empty()
        except BaseException as error:  # shown by the block's end, not lost in a thread
            failures.append(error)
            stop()

    thread = threading.Thread(target=work, name="mailbox", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        try:
            if failures:
                raise failures[0]
            with contextlib.suppress(ray.exceptions.RayError):
                empty()
        finally:
            ray.kill(mailbox)
