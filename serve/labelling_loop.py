"""Fills the labelling queue through the day: uncertain answers and random ones, as far as the day has room."""

import logging
import os
import socket
import threading
import time

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.database import connect
from cluster.errors import RayloopError
from cluster.lease import acquire_lease, release_lease
from cluster.settings import Settings
from data.labelling.queue import LabelQueue
from data.labelling.sampling import sample_for_labelling

log = logging.getLogger(__name__)

LEASE = "labelling"


class LabellingLoop(threading.Thread):
    """Draws now and then while it holds the lease; several of them draw once."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name=LEASE, daemon=True)
        self._settings = settings
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{time.monotonic_ns()}"
        self._stopping = threading.Event()
        self._engine: Engine | None = None
        self._queue: LabelQueue | None = None

    def run(self) -> None:
        """Until it is stopped; what fails is tried again at the next time."""
        while not self._stopping.is_set():
            try:
                self.draw()
            except (RayloopError, sa.exc.SQLAlchemyError, OSError) as error:
                log.warning("nothing is drawn for labelling: %s", str(error).splitlines()[0])
            except Exception:  # a defect must not end the thread
                log.exception("drawing for labelling failed")
            self._stopping.wait(self._settings.labelling.sample_every_s)
        self._end()

    def draw(self) -> int:
        """Fill the queue once, if this process is the one that does; returns how many items came in."""
        if not self._settings.learning.enabled:
            return 0
        if self._engine is None or self._queue is None:
            self._engine = connect(self._settings)
            self._queue = LabelQueue(self._engine, self._settings.labelling)
        duration_s = 2 * self._settings.labelling.sample_every_s
        if not acquire_lease(self._engine, LEASE, self._holder, duration_s, now_us()):
            return 0
        return sample_for_labelling(self._engine, self._settings, self._queue)

    def stop(self) -> None:
        """End after the drawing under way."""
        self._stopping.set()

    def _end(self) -> None:
        if self._engine is None:
            return
        try:
            release_lease(self._engine, LEASE, self._holder)
        except (RayloopError, sa.exc.SQLAlchemyError) as error:
            log.warning("the lease of %s runs out by itself: %s", LEASE, error)
        self._engine.dispose()
