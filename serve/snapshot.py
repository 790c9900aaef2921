"""What a router knows: routes, servable versions and keys, read together and swapped as one.

A thread reads the database every `serve.poll_ms`, off the event loop. While the database is away the last
snapshot stays in use. The same thread writes a deployment config into the routes and keeps trying until
the database has taken it, so `reconfigure` never waits and never raises.
"""

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster import metrics
from cluster.clock import now_us
from cluster.database import connect
from cluster.errors import ConfigError, RayloopError
from cluster.settings import Settings
from cluster.settings.serving import EngineEndpoint
from cluster.tables import servable_replicas, servables
from data.events import Event
from data.log import EventLog
from data.prompt import AgentPrompt
from data.prompt_versions import prompts_in_force
from serve.accepted_config import keep_accepted, last_accepted
from serve.applications.document import is_ours
from serve.deployment_config import RouterConfig, apply_config, parse_config
from serve.egress import check_endpoints
from serve.keys import KeyRing
from serve.readiness import NotReadyError, only_ready
from serve.replicas import ReplicaReport
from serve.routes import Route, RouteKey, read_routes

log = logging.getLogger(__name__)

REJECTION_WINDOW_US = 60_000_000  # the same refusal by several replicas within a minute is one event


@dataclass(frozen=True, slots=True)
class Target:
    """Where a version is served: the engine and the model's name there."""

    version: str
    engine: str
    model_name: str
    digest: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """Everything a request is decided by. Immutable."""

    routes: Mapping[RouteKey, Route] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    keys: KeyRing = field(default_factory=KeyRing)
    health: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Version -> number of engine replicas in each state."""
    read_at: float = 0.0
    """Monotonic time; 0 when nothing has been read yet."""
    owners: Mapping[str, str] = field(default_factory=dict)
    """Version, and its second name `ft:…` where it has one -> the tenant it belongs to; `targets` has both too."""
    prompts: Mapping[tuple[str, str], AgentPrompt] = field(default_factory=dict)
    """Tenant and agent -> the prompt in front of its requests."""

    def known_models(self, tenant: str) -> list[str]:
        """Agents with a route, then the versions that are served and visible."""
        agents = sorted({key.agent for key in self.routes if key.tenant == tenant})
        return agents + sorted(v for v in self.targets if self.visible(tenant, v))

    def visible(self, tenant: str, version: str) -> bool:
        """A tenant sees its own versions and those that its routes name.

        What belongs to nobody (a model of an engine's configuration) it sees where it has a route of that agent.
        """
        owner = self.owners.get(version)
        if owner == tenant:
            return True
        agent = version.rpartition("/")[0]
        mine = [route for key, route in self.routes.items() if key.tenant == tenant]
        return any(version in r.versions or (owner is None and agent == r.agent) for r in mine)


def read_snapshot(engine: Engine, endpoints: Mapping[str, EngineEndpoint]) -> Snapshot:
    """The database's state now."""
    targets = {
        version: Target(version, name, model)
        for name, endpoint in endpoints.items()
        for version, model in endpoint.models.items()
    }
    owners: dict[str, str] = {}
    with engine.connect() as connection:
        for row in connection.execute(sa.select(servables).where(servables.c.wanted)).mappings():
            if row["engine"] in endpoints or is_ours(row["engine"]):
                target = Target(row["version"], row["engine"], row["model_name"], row["adapter_sha256"])
                names = [name for name in (target.version, row["alias"]) if name is not None]
                targets |= dict.fromkeys(names, target)
                if row["tenant"] is not None:
                    owners |= dict.fromkeys(names, row["tenant"])
        health: dict[str, dict[str, int]] = {}
        counts = sa.select(servable_replicas.c.version, servable_replicas.c.state, sa.func.count()).group_by(
            servable_replicas.c.version, servable_replicas.c.state
        )
        for version, state, number in connection.execute(counts):
            health.setdefault(version, {})[state] = number
        prompts = prompts_in_force(connection)
    routes = {route.key: route for route in read_routes(engine)}
    return Snapshot(routes, targets, KeyRing.read(engine), health, time.monotonic(), owners, prompts)


def known_versions(engine: Engine, endpoints: Mapping[str, EngineEndpoint]) -> frozenset[str]:
    """Versions that engines hold or are asked to hold."""
    with engine.connect() as connection:
        wanted = connection.execute(sa.select(servables.c.version).where(servables.c.wanted)).scalars().all()
    return frozenset(wanted) | {version for endpoint in endpoints.values() for version in endpoint.models}


class Watcher(threading.Thread):
    """Keeps `current` fresh, and brings deployment configs into the routes."""

    def __init__(
        self,
        settings: Settings,
        on_engine: Callable[[Engine], None] | None = None,
        on_poll: Callable[[Engine, Snapshot], None] | None = None,
    ) -> None:
        super().__init__(name="snapshot", daemon=True)
        self._settings = settings
        self._on_engine, self._on_poll = on_engine, on_poll
        self._stopping = threading.Event()
        self._engine: Engine | None = None
        self._pending: RouterConfig | None = None
        self._refusals: list[tuple[Any, str]] = []
        self._lock = threading.Lock()
        self._ceilings: dict[RouteKey, float] = {}
        self._report = ReplicaReport(uuid.uuid4().hex, settings.serve.live_after_s)
        self._was_down = self._restored = False
        self.endpoints: dict[str, EngineEndpoint] = dict(settings.serve.engines)
        self.current = Snapshot()
        self.rejection: str | None = None
        """Why the last config was refused; `None` when it was taken."""

    def configure(self, document: Any) -> None:
        """Take a deployment config. Never raises: a bad one is recorded and the old state stays."""
        try:
            config = parse_config(document)
            check_endpoints(config.engines, self._settings.serve.allowed_hosts)
        except ConfigError as error:
            self._refuse(document, str(error))
            return
        except Exception as error:  # whatever it is, raising here would be an outage
            log.exception("a deployment config could not be read")
            self._refuse(document, f"cannot be read ({type(error).__name__}: {error})")
            return
        with self._lock:
            self._pending = config

    def stop(self) -> None:
        """End the thread, and its connections."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=5)

    def run(self) -> None:
        """Read until stopped."""
        while not self._stopping.is_set():
            try:
                self.refresh()
            except Exception:  # this thread is the only source of changes: it must outlive any surprise
                log.exception("routes and keys could not be read; they stay as last read")
            self._stopping.wait(self._settings.serve.poll_ms / 1000)
        self._leave()

    def close(self) -> None:
        """Close the database's connections; nobody may use them any more."""
        if self._engine is not None:
            self._engine.dispose()

    def refresh(self) -> None:
        """One reading; a failure keeps the last."""
        try:
            engine = self._connected()
            self._apply_pending(engine)
            self._publish_refusals(engine)
            snapshot = read_snapshot(engine, self.endpoints)
            self.endpoints = _with_applications(self.endpoints, snapshot)
            self.current = self._with_ceilings(snapshot)
            self._report.tell(engine, self.current.routes)
            if self._on_poll is not None:
                self._on_poll(engine, self.current)
            self._was_down = False
        except (sa.exc.SQLAlchemyError, OSError, RayloopError) as error:
            self._ceilings_alone()
            if not self._was_down:
                log.warning("the database does not answer (%s); routes and keys stay as last read", error)
            self._was_down = True
        self._measure()

    def _leave(self) -> None:
        if self._engine is None:
            return
        try:
            self._report.leave(self._engine)
        except (sa.exc.SQLAlchemyError, OSError, RayloopError) as error:
            log.warning("this router counts as gone in %g s: %s", self._settings.serve.live_after_s, error)

    def _connected(self) -> Engine:
        if self._engine is None:
            self._engine = connect(self._settings)
            if self._on_engine is not None:
                self._on_engine(self._engine)
        if not self._restored:
            if (config := last_accepted(self._engine, self._settings.tenant)) is not None:
                self._accept(config)
            self._restored = True
        return self._engine

    def _apply_pending(self, engine: Engine) -> None:
        with self._lock:
            config = self._pending
        if config is None:
            return
        settings = self._settings
        try:
            endpoints = {**settings.serve.engines, **config.engines}
            known = known_versions(engine, endpoints)
            check = only_ready(engine, endpoints, live_after_s=settings.engine.live_after_s)
            for applied in apply_config(
                engine, config, tenant=settings.tenant, workspace=settings.workspace, known=known, check=check
            ):
                log.info(
                    "deployment config: route %s %s, revision %d",
                    applied.key,
                    applied.status,
                    applied.revision,
                )
        except NotReadyError as error:
            self._wait_for(config, str(error))
            return
        except ConfigError as error:
            self._refuse(config.model_dump(mode="json", exclude_unset=True), str(error))
        else:
            keep_accepted(engine, settings.tenant, config)
            self._accept(config)
            self.rejection = None
        with self._lock:
            if self._pending is config:
                self._pending = None

    def _wait_for(self, config: RouterConfig, reason: str) -> None:
        """Say once that a config waits for a version; it stays pending. Its ceilings hold at once."""
        self._ceilings |= self._ceilings_of(config)
        if self.rejection != (told := f"{reason}; the config is applied once it is"):
            self._refuse(config.model_dump(mode="json", exclude_unset=True), told)

    def _accept(self, config: RouterConfig) -> None:
        self.endpoints = {**self._settings.serve.engines, **config.engines}
        self._ceilings = self._ceilings_of(config)

    def _ceilings_of(self, config: RouterConfig) -> dict[RouteKey, float]:
        tenant = self._settings.tenant
        return {
            RouteKey(d.tenant or tenant, d.agent, d.modality): d.max_share
            for d in config.routes
            if "max_share" in d.model_fields_set
        }

    def _with_ceilings(self, snapshot: Snapshot) -> Snapshot:
        """A ceiling of the config holds here even where the row cannot be written."""
        lowered = {
            key: replace(route, max_share=min(route.max_share, self._ceilings.get(key, 1.0)))
            for key, route in snapshot.routes.items()
        }
        return replace(snapshot, routes=lowered)

    def _ceilings_alone(self) -> None:
        """Without the database, the ceilings of a config that waits still hold."""
        with self._lock:
            waiting = self._pending
        if waiting is not None and self.current.read_at:
            self._ceilings |= self._ceilings_of(waiting)
            self.current = self._with_ceilings(self.current)

    def _refuse(self, document: Any, reason: str) -> None:
        log.error("deployment config rejected, the old one stays: %s", reason)
        metrics.CONFIG_REJECTED.inc()
        with self._lock:
            self.rejection = reason
            self._refusals.append((document, reason))

    def _publish_refusals(self, engine: Engine) -> None:
        with self._lock:
            refusals = list(self._refusals)
        if not refusals:
            return
        settings = self._settings
        events = [
            Event(
                "config.rejected",
                settings.tenant,
                settings.workspace,
                {"source": "user_config", "reason": reason},
                event_id=_rejection_id(document, reason),
            )
            for document, reason in refusals
        ]
        EventLog(engine).append(events)
        with self._lock:
            del self._refusals[: len(refusals)]

    def _measure(self) -> None:
        metrics.SNAPSHOT_AGE.set(time.monotonic() - self.current.read_at if self.current.read_at else float("inf"))
        for key, route in self.current.routes.items():
            labels = (key.tenant, key.agent, key.modality)
            metrics.ROUTE_REVISION.labels(*labels).set(route.revision)
            metrics.ROUTE_SHARE.labels(*labels).set(route.live_share)


def _with_applications(endpoints: dict[str, EngineEndpoint], snapshot: Snapshot) -> dict[str, EngineEndpoint]:
    """The engines, with those applications of this Serve that a rollout has brought up."""
    named = {target.engine for target in snapshot.targets.values()} - endpoints.keys()
    return {**endpoints, **dict.fromkeys(named, EngineEndpoint())} if named else endpoints


def _rejection_id(document: Any, reason: str) -> str:
    text = orjson.dumps([document, reason], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str)
    return f"config-rejected-{hashlib.sha256(text).hexdigest()[:32]}-{now_us() // REJECTION_WINDOW_US}"
