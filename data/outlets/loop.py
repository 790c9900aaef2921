"""Keeps the outlets running: a thread each, so that a slow receiver holds up nobody else."""

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.database import connect
from cluster.errors import ConfigError, ConflictError, RayloopError
from cluster.lease import acquire_lease, release_lease
from cluster.settings import Settings
from data.outlets.outlet import Outlet, Plan
from data.outlets.sinks import plans

log = logging.getLogger(__name__)

MEASURE_S = 15.0
FAILED_PAUSE_S = 5.0  # after the database did not answer, or after a defect


class OutletThread(threading.Thread):
    """Delivers for one outlet while it holds the outlet's lease."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        super().__init__(name=plan.name, daemon=True)
        self.plan, self._settings = plan, settings
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}:{time.monotonic_ns()}"
        self._stopping = threading.Event()
        self._engine: Engine | None = None
        self._measure_at = 0.0

    def run(self) -> None:
        """Until it is stopped; whatever fails is tried again."""
        outlet: Outlet | None = None
        while not self._stopping.is_set():
            try:
                if self._engine is None:
                    self._engine = connect(self._settings)
                if outlet is None:
                    outlet = Outlet(self.plan, self._engine, self._settings.outlets)
                pause_s = self._turn(outlet)
            except ConfigError as error:
                log.error("%s delivers nothing: %s", self.plan.name, error)
                break
            except ConflictError as error:
                log.info("%s", error)
                pause_s = self._settings.outlets.poll_s
            except (RayloopError, sa.exc.SQLAlchemyError, OSError) as error:
                log.warning("%s waits: %s", self.plan.name, str(error).splitlines()[0])
                pause_s = FAILED_PAUSE_S
            except Exception:  # a defect must not end the thread: the next event may be fine
                log.exception("%s failed", self.plan.name)
                pause_s = FAILED_PAUSE_S
            self._stopping.wait(min(pause_s, self._settings.outlets.lease_s / 3))
        self._end(outlet)

    def _turn(self, outlet: Outlet) -> float:
        """One step and, now and then, the gauges, while this process is the one that delivers."""
        if not self._holds():
            return self._settings.outlets.poll_s
        pause_s = outlet.step(self._holds)
        if time.monotonic() >= self._measure_at:
            outlet.measure()
            self._measure_at = time.monotonic() + MEASURE_S
        return pause_s

    def stop(self) -> None:
        """End after the delivery under way."""
        self._stopping.set()

    def _holds(self) -> bool:
        """True while this process is the one that delivers."""
        assert self._engine is not None
        if self._stopping.is_set():
            return False
        return acquire_lease(self._engine, self.plan.name, self._holder, self._settings.outlets.lease_s, now_us())

    def _end(self, outlet: Outlet | None) -> None:
        if outlet is not None:
            outlet.sink.close()
        if self._engine is None:
            return
        try:
            release_lease(self._engine, self.plan.name, self._holder)
        except (RayloopError, sa.exc.SQLAlchemyError) as error:
            log.warning("the lease of %s runs out by itself: %s", self.plan.name, error)
        self._engine.dispose()


class OutletLoop:
    """The threads of all outlets that are configured."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads: Sequence[OutletThread] = ()

    def start(self) -> None:
        """Start them; a wrong configuration is logged and stops nothing else."""
        try:
            self._threads = [OutletThread(plan, self._settings) for plan in plans(self._settings)]
        except ConfigError as error:
            log.error("nothing leaves: %s", error)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End them; a delivery that hangs is left behind."""
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.join(timeout=self._settings.outlets.poll_s)

    @property
    def alive(self) -> list[str]:
        """Names of the outlets whose thread runs."""
        return [thread.name for thread in self._threads if thread.is_alive()]
