"""Keeps one engine replica holding what the table `servables` asks for.

A thread reads the table a few times a second. A version becomes ready when its base model is this
engine's, its template is the one it was trained with, and the engine has read, checked and tried its
adapter. Whatever fails is reported with its reason and the engine goes on with what it has; so it does
while the database is away. A version that is no longer wanted stays for a while, for requests under way
and for routers that have not read the new route yet. Directories are never deleted here.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.settings.engines import EngineSettings
from cluster.tables import servable_replicas
from serve.engines.adapter_source import AdapterError
from serve.engines.autoscaling import may_idle
from serve.engines.host import BASE_NAME, AdapterHost
from serve.servables import PRESENCE, ReplicaState, Servable, list_servables

log = logging.getLogger(__name__)

FORGET_AFTER = 10  # heartbeats' live time after which a dead replica's rows are deleted


@dataclass
class _Held:
    """What this replica knows of one version."""

    servable: Servable
    state: ReplicaState
    reason: str | None = None
    tried_at: float = 0.0
    unwanted_since: float | None = None


class Reconciler:
    """One replica's side of the table. `tick` may also be called directly, before `start`."""

    def __init__(
        self,
        engine: AdapterHost,
        database: Engine,
        replica_id: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._database = engine, database
        self._replica_id, self._clock = replica_id[:64], clock
        self._held: dict[str, _Held] = {}
        self._unloading = ThreadPoolExecutor(1, thread_name_prefix="unload")
        self._leaving: dict[str, Future[Any]] = {}
        """By model name: an unload waits for the answers that use the adapter, and the table must not wait with it."""
        self._down = False
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(step, interval_s), name=name, daemon=True)
            for step, interval_s, name in (
                (self.tick, engine.settings.poll_interval_s, "servables"),
                (self.beat, engine.settings.heartbeat_s, "heartbeat"),  # of its own: loading may take long
            )
        ]

    @property
    def _settings(self) -> EngineSettings:
        return self._engine.settings  # which a deployment config may change

    def start(self) -> None:
        """Load what is wanted, then report for duty and follow the table from threads.

        Until this returns no version counts on this replica, so that starting one takes no version away.
        """
        for step in (self.tick, self.beat, self._forget_idle):
            self._guarded(step)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop, and say so in the table.

        An engine that may idle leaves what it held behind: whoever asks next finds it loaded again.
        """
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(10)
        self._unloading.shutdown(wait=False, cancel_futures=True)
        try:
            with write(self._database).begin() as connection:
                leave = self._idled() if may_idle(self._settings) else sa.delete(servable_replicas).where(self._mine())
                connection.execute(leave)
        except sa.exc.SQLAlchemyError as error:
            log.warning("the engine's rows could not be removed (%s); they expire by themselves", error)

    def states(self) -> dict[str, tuple[ReplicaState, str | None]]:
        """State and reason of every version this replica knows."""
        return {version: (held.state, held.reason) for version, held in self._held.items()}

    def tick(self) -> None:
        """Read the table once, and load, release and report."""
        now = self._clock()
        self._leaving = {name: left for name, left in self._leaving.items() if not left.done()}
        rows = {s.version: s for s in list_servables(self._database, self._settings.name)}
        self._release(rows, now)
        for servable in rows.values():
            if servable.wanted:
                self._hold(servable, now)

    def beat(self) -> None:
        """Say that this replica and all it holds live, and forget replicas that died long ago."""
        self._write(PRESENCE, "ready", None)
        r = servable_replicas.c
        now = now_us()
        forget = now - round(FORGET_AFTER * self._settings.live_after_s * SECOND_US)
        with write(self._database).begin() as connection:
            connection.execute(sa.update(servable_replicas).where(self._mine()).values(heartbeat_us=now))
            old = (r.engine == self._settings.name) & (r.heartbeat_us < forget)
            connection.execute(sa.delete(servable_replicas).where(old))

    def _idled(self) -> sa.Update:
        """Its rows, as those of a replica that comes back when it is asked; failures stay failures."""
        ready = self._mine() & (servable_replicas.c.state == "ready")
        return sa.update(servable_replicas).where(ready).values(state="idle")

    def _forget_idle(self) -> None:
        """Take away what replicas left behind that are no longer: from here on this one speaks for the engine."""
        r = servable_replicas.c
        left = (r.engine == self._settings.name) & (r.state == "idle")
        with write(self._database).begin() as connection:
            connection.execute(sa.delete(servable_replicas).where(left))

    def _repeat(self, step: Callable[[], None], interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            self._guarded(step)

    def _guarded(self, step: Callable[[], None]) -> None:
        """A step whose failure is a warning: what is loaded goes on serving."""
        try:
            step()
            self._down = False
        except sa.exc.SQLAlchemyError as error:
            if not self._down:
                log.warning("servables cannot be read (%s); serving what is loaded", str(error).splitlines()[0])
            self._down = True
        except Exception:
            log.exception("the engine could not follow the table of servables; trying again")

    def _hold(self, servable: Servable, now: float) -> None:
        held = self._held.get(servable.version)
        if held is not None and _same(held.servable, servable):
            held.unwanted_since = None
            again = servable.updated_at_us != held.servable.updated_at_us
            held.servable = servable
            overdue = now - held.tried_at >= self._settings.retry_failed_s
            if held.state == "ready" or not (again or overdue):
                if again:
                    self._report(held)
                return
        if held is not None:
            self._unload(held)
        held = self._held[servable.version] = _Held(servable, "loading", tried_at=now)
        self._report(held)
        if not self._has_room_for(servable):
            held.tried_at = float("-inf")  # at the next look
            return
        try:
            self._load(servable)
            held.state = "ready"
            log.info("version %s is ready as %s", servable.version, servable.model_name)
        except Exception as error:
            known = isinstance(error, AdapterError)
            held.state, held.reason = "failed", str(error) if known else f"{type(error).__name__}: {error}"
            log.warning("version %s cannot be served: %s", servable.version, held.reason, exc_info=not known)
        self._report(held)

    def _load(self, servable: Servable) -> None:
        self._engine.base.check(servable.base_model, servable.base_revision)
        ours = self._engine.template_digest
        if servable.template_digest is not None and servable.template_digest != ours:
            raise AdapterError(
                f"it was trained with the chat template {servable.template_digest[:12]}, "
                f"this engine renders with {ours[:12]}"
            )
        if servable.adapter_sha256 is None:
            return
        if servable.adapter_path is None:
            raise AdapterError("no directory is recorded for its adapter")
        self._engine.load_adapter(servable.model_name, servable.adapter_path, expected_sha256=servable.adapter_sha256)

    def _has_room_for(self, servable: Servable) -> bool:
        """False while an unload must end first; a full engine releases the version that has been unwanted longest."""
        if servable.adapter_sha256 is None:
            return True
        if servable.model_name in self._leaving:
            return False
        names = {model.name for model in self._engine.models()} | self._leaving.keys()
        if len(names - {BASE_NAME}) < self._settings.max_adapters:
            return True
        lingering = [h for h in self._held.values() if h.unwanted_since is not None and h.state == "ready"]
        if lingering and not self._leaving:
            self._drop(min(lingering, key=lambda h: h.unwanted_since or 0.0))
        return not self._leaving

    def _release(self, rows: dict[str, Servable], now: float) -> None:
        for version, held in list(self._held.items()):
            row = rows.get(version)
            if row is not None and row.wanted:
                continue
            if held.unwanted_since is None:
                held.unwanted_since = now
            if held.state != "ready" or now - held.unwanted_since >= self._settings.unload_delay_s:
                self._drop(held)

    def _drop(self, held: _Held) -> None:
        version = held.servable.version
        del self._held[version]
        self._unload(held)
        with write(self._database).begin() as connection:
            connection.execute(sa.delete(servable_replicas).where(self._mine(version)))

    def _unload(self, held: _Held) -> None:
        if held.servable.adapter_sha256 is not None and held.state == "ready":
            name = held.servable.model_name
            self._leaving[name] = self._unloading.submit(self._engine.unload_adapter, name)
            log.info("version %s is released", held.servable.version)

    def _report(self, held: _Held) -> None:
        self._write(held.servable.version, held.state, held.reason)

    def _write(self, version: str, state: ReplicaState, reason: str | None) -> None:
        values = {"state": state, "reason": reason, "heartbeat_us": now_us()}
        keys = {"engine": self._settings.name, "replica_id": self._replica_id, "version": version}
        with write(self._database).begin() as connection:
            updated = connection.execute(sa.update(servable_replicas).where(self._mine(version)).values(**values))
            if updated.rowcount == 0:
                connection.execute(servable_replicas.insert().values(**keys, **values))

    def _mine(self, version: str | None = None) -> sa.ColumnElement[bool]:
        r = servable_replicas.c
        mine = (r.engine == self._settings.name) & (r.replica_id == self._replica_id)
        return mine if version is None else mine & (r.version == version)


def _same(one: Servable, other: Servable) -> bool:
    """Whether both name the same weights under the same conditions, wherever they are read from."""
    fields = (
        "model_name",
        "base_model",
        "adapter_sha256",
        "base_revision",
        "template_digest",
    )
    return all(getattr(one, field) == getattr(other, field) for field in fields)
