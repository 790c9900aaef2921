"""The application `control` (at `/control`): one replica that counts the log and drives every rollout.

It also runs the outlets (`data.outlets.loop`) and fills the labelling queue. The work is done in threads, so the
replica always answers `GET /healthz`, and `GET /metrics` with what this process counts. A second replica, or a second
cluster on the same database, finds the leases taken and waits. `GET /rollouts` shows the rollouts of the key's tenant.
"""

import asyncio
import logging
import threading
import time
from typing import Any

import ray.serve
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.errors import RayloopError
from cluster.logs import configure_logging
from cluster.metrics_files import publish_metrics
from cluster.settings import Settings
from data.outlets.loop import OutletLoop
from serve.asgi import HttpApplication, require_method, send_json
from serve.finetuning.dispatcher import DispatchLoop
from serve.known_keys import KnownKeys
from serve.labelling_loop import LabellingLoop
from serve.openai import ApiError, Receive, Scope, Send
from serve.rollout.controller import Controller
from serve.rollout.live import OwnKeys, controller_steps
from serve.rollout.report import describe
from serve.rollout.store import list_rollouts

log = logging.getLogger(__name__)

RENEWALS = 4  # rounds within the life of a lease
HEALTHY_TICKS = 10  # a loop that has not come round for this many intervals is not well
KEYS_REFRESH_S = 2.0


class ControlLoop(threading.Thread):
    """Ticks until it is stopped; whatever fails in one tick is tried again in the next.

    Between two ticks it keeps its lease. Without one it tries to get it, and applies what was decided already.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="rollout-controller", daemon=True)
        self.settings = settings
        self.is_leader = False
        self.failure: str | None = None
        self.went_round_at = time.monotonic()
        self._ticked_at = float("-inf")
        self._stopping = threading.Event()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The database; connected when it first answers."""
        if self._engine is None:
            self._engine = connect(self.settings)
        return self._engine

    def run(self) -> None:
        """The loop. Without the database nothing is decided: shares stay as they are."""
        controller: Controller | None = None
        keys: OwnKeys | None = None
        while not self._stopping.is_set():
            try:
                if keys is None:
                    keys = OwnKeys(self.engine, self.settings)
                if controller is None:
                    controller = Controller(controller_steps(self.engine, self.settings, keys), self.settings)
                self._go_round(controller)
                self.failure = None
            except (RayloopError, sa.exc.SQLAlchemyError, OSError) as error:
                self.failure = str(error).splitlines()[0]
                log.warning("no rollout moves: %s", self.failure)
            except Exception as error:  # a defect must not end the loop that can roll back
                self.failure = repr(error)
                log.exception("a tick failed")
            self.went_round_at = time.monotonic()
            self._stopping.wait(self.pace_s)
        self._end(controller, keys)

    @property
    def pace_s(self) -> float:
        """Time between two rounds."""
        rollout = self.settings.rollout
        return min(rollout.tick_s, rollout.lease_s / RENEWALS)

    def _go_round(self, controller: Controller) -> None:
        is_early = time.monotonic() - self._ticked_at < self.settings.rollout.tick_s
        if self.is_leader and is_early:
            self.is_leader = controller.leads()
        else:
            self._ticked_at = time.monotonic()
            self.is_leader = controller.tick()

    def stop(self) -> None:
        """End after the tick under way, and let another controller take over at once."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=self.settings.rollout.tick_s + self.settings.rollout.smoke_timeout_s)

    def health(self) -> dict[str, Any]:
        """What `/healthz` says."""
        age_s = time.monotonic() - self.went_round_at
        limit_s = HEALTHY_TICKS * self.settings.rollout.tick_s + self.settings.rollout.smoke_timeout_s
        well = self.is_alive() and age_s < limit_s and self.failure is None
        return {
            "status": "ok" if well else "degraded",
            "leader": self.is_leader,
            "last_tick_s": round(age_s, 3),
            "failure": self.failure,
        }

    def _end(self, controller: Controller | None, keys: OwnKeys | None) -> None:
        try:
            if controller is not None:
                controller.close()
            if keys is not None:
                keys.close()
        except (RayloopError, sa.exc.SQLAlchemyError) as error:
            log.warning("the lease runs out by itself: %s", error)


class ControlApi(HttpApplication):
    """The ASGI callable."""

    def __init__(self, loop: ControlLoop, keys: KnownKeys) -> None:
        self._loop, self._keys = loop, keys

    async def respond(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if path == "/metrics" and scope["method"] == "GET":
            await self._keys.send_metrics(scope, send)
            return
        status, body = await self._answer(path, scope)
        await send_json(send, body, status)

    async def _answer(self, path: str, scope: Scope) -> tuple[int, dict[str, Any]]:
        require_method(scope, path, "GET")
        if path == "/healthz":
            health = self._loop.health()
            return (200 if health["status"] == "ok" else 503), health
        if path != "/rollouts":
            raise ApiError(
                404, f"There is no {path} here; known are /healthz, /metrics and /rollouts.", code="not_found"
            )
        key = await self._keys.admit(scope)
        try:
            found = await asyncio.to_thread(lambda: list_rollouts(self._loop.engine, key.tenant))
        except (RayloopError, sa.exc.SQLAlchemyError):
            raise ApiError(503, "The database does not answer.", code="database_unavailable") from None
        return 200, {"object": "list", "data": [describe(rollout) for rollout in found]}


@ray.serve.deployment(name="Control")
@ray.serve.ingress()
class ControlReplica:
    """The one replica."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.logging)
        publish_metrics(settings.metrics)
        self._settings = settings
        self._loop = ControlLoop(settings)
        self._loop.start()
        self._jobs = DispatchLoop(settings)
        self._jobs.start()
        self._outlets = OutletLoop(settings)
        self._outlets.start()
        self._labelling = LabellingLoop(settings)
        self._labelling.start()

    async def __serve_build_asgi_app__(self) -> ControlApi:
        """The application of this replica."""
        return ControlApi(self._loop, KnownKeys(self._settings, KEYS_REFRESH_S))

    def check_health(self) -> None:
        """Serve restarts the replica when a loop has ended."""
        if not (self._loop.is_alive() and self._jobs.is_alive()):
            raise RuntimeError("the control loop has ended")

    def __del__(self) -> None:
        """Let another controller take over at once."""
        self._jobs.stop()
        self._outlets.stop()
        self._labelling.stop()
        self._loop.stop()


def build(settings: Settings) -> Any:
    """The application, at `/control`."""
    deployment: Any = ControlReplica  # the decorator made a deployment of the class
    return deployment.options(
        num_replicas=1,
        ray_actor_options={"num_cpus": settings.rollout.control_cpus},
        graceful_shutdown_wait_loop_s=0.2,
    ).bind(settings)
