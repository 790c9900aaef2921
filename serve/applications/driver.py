"""What brings applications up and takes them down, and the loop's side of it: make them those that are wanted.

The table `servables` says which version should be held by which engine; an engine of ours is an application.
Each tick the controller names the wanted ones to the driver, which changes what differs. So a write that was
lost, refused or undone by somebody else is made again, and no command needs access to the cluster.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US
from cluster.errors import RayloopError
from serve.applications.document import Application, is_ours
from serve.servables import Servable, list_servables

log = logging.getLogger(__name__)

Status = Literal["absent", "loading", "ready", "failed"]
Said = dict[str, tuple[Status, str]]
"""Application -> its status, and why."""

STATUS: dict[str, Status] = {"RUNNING": "ready", "DEPLOY_FAILED": "failed"}
"""Ray Serve's words; every other one means that it is on its way."""


class Driver(Protocol):
    """Ray Serve's REST API or the RayService resource."""

    def apply(self, wanted: Sequence[Application]) -> Said:
        """Make the applications of ours exactly these, and say how each is. Doing it again changes nothing.

        Raises:
            UnavailableError: the API does not answer.
            ConflictError: it refuses.
            ConfigError: the deployed config cannot be extended.
        """


def status_of(state: str, message: str) -> tuple[Status, str]:
    """Ray Serve's state of an application as ours."""
    return STATUS.get(state, "loading"), message or state


def wanted_applications(engine: Engine, linger_s: float, now_us: int) -> list[Application]:
    """Applications that hold a wanted version, or held one until `linger_s` ago: streams end in peace."""
    by_engine: dict[str, list[Servable]] = defaultdict(list)
    for servable in list_servables(engine):
        if is_ours(servable.engine):
            by_engine[servable.engine].append(servable)
    since_us = now_us - round(linger_s * SECOND_US)
    return [
        Application(name, held[0].base_model)
        for name, held in sorted(by_engine.items())
        if any(servable.wanted or servable.updated_at_us > since_us for servable in held)
    ]


class Applications:
    """The applications of one installation, as last seen."""

    def __init__(self, engine: Engine, make_driver: Callable[[], Driver], linger_s: float) -> None:
        self.engine, self.make_driver, self.linger_s = engine, make_driver, linger_s
        self._driver: Driver | None = None
        self._said: Said = {}
        self._failure: str | None = None

    def sync(self, now_us: int) -> None:
        """One reconciliation. A failure is kept for `status`, and tried again at the next: rollouts without an
        application must not wait for a driver that cannot be made."""
        wanted = wanted_applications(self.engine, self.linger_s, now_us)
        try:
            self._driver = self._driver or self.make_driver()
            self._said = self._driver.apply(wanted)
            self._failure = None
        except RayloopError as error:
            if str(error) != self._failure:
                log.warning("applications stay as they are: %s", error)
            self._failure = str(error)

    def status(self, name: str) -> tuple[Status, str]:
        """How an application is: `absent` until a driver has seen it."""
        if name not in self._said and self._failure is not None:
            return "loading", self._failure
        return self._said.get(name, ("absent", "not deployed yet"))
