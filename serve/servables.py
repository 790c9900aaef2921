"""Which versions each engine should hold, and which of its replicas do.

`want` and `unwant` write the table `servables`; every replica of an engine reads it, loads what is missing
after its checks (engines/reconciler.py) and reports in `servable_replicas`. A version may be given traffic
when it is `ready`: every replica that lives has it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.errors import ConflictError, InputError, NotFoundError, UnavailableError
from cluster.registry import Version
from cluster.settings.engines import EngineSettings
from cluster.tables import servable_replicas, servables

ReplicaState = Literal["loading", "ready", "failed", "idle"]
"""`idle`: it was ready when the engine's last replicas went for want of requests, and is again at the next one."""
PRESENCE = ""
"""The version of the row by which a replica says that it lives, whatever it holds."""
DEFAULTS = EngineSettings()


@dataclass(frozen=True, slots=True)
class Servable:
    """One version that an engine should hold, or should let go."""

    version: str
    engine: str
    model_name: str
    base_model: str
    adapter_path: str | None
    adapter_sha256: str | None
    base_revision: str | None
    template_digest: str | None
    prompt_digest: str | None
    """Of the agent's prompt that it was trained with (`Version.trained_behind`)."""
    alias: str | None
    """A second name, `ft:…`."""
    tenant: str | None
    """Whose version it is: others may use it only where a route of theirs names it."""
    wanted: bool
    updated_at_us: int


@dataclass(frozen=True, slots=True)
class Report:
    """What one replica says of one version."""

    engine: str
    replica_id: str
    version: str
    state: str
    reason: str | None
    heartbeat_us: int


def want(
    database: Engine,
    version: Version,
    engine_name: str,
    *,
    adapter_location: str | None = None,
    alias: str | None = None,
) -> Servable:
    """Ask an engine to hold a version; asking again retries one that failed, and keeps its alias.

    It belongs to the tenant that registered it. `alias` is a second name, `ft:…`.

    `adapter_location` is the folder or URI that engines read the adapter from (`serve.adapter_store`), where it is not
    the one that `version` names.

    Raises:
        InputError: the version has an adapter, and neither names its directory.
    """
    location = adapter_location or (str(version.adapter_path) if version.adapter_path is not None else None)
    if version.adapter_sha256 is not None and location is None:
        raise InputError(
            "version",
            version.id,
            "has an adapter that is not on this machine",
            "fetch it with `serve.adapter_store.adapter_location`",
        )
    servable = Servable(
        version=version.id,
        engine=engine_name,
        model_name=version.served_name,
        base_model=version.base_model,
        adapter_path=location if version.adapter_sha256 is not None else None,
        adapter_sha256=version.adapter_sha256,
        base_revision=version.tags.get("base_revision"),
        template_digest=version.tags.get("template_digest"),
        prompt_digest=version.trained_behind,
        alias=alias,
        tenant=version.tags.get("rayloop.tenant"),
        wanted=True,
        updated_at_us=now_us(),
    )
    values = {name: getattr(servable, name) for name in servable.__slots__}
    if alias is None:
        del values["alias"]
    with write(database).begin() as connection:
        this = (servables.c.version == version.id) & (servables.c.engine == engine_name)
        if connection.execute(sa.update(servables).where(this).values(**values)).rowcount == 0:
            connection.execute(servables.insert().values(**values))
        _forget_failures(connection, version.id, engine_name)
    return servable


def _forget_failures(connection: Connection, version: str, engine_name: str) -> None:
    r = servable_replicas.c
    failed = (r.version == version) & (r.engine == engine_name) & (r.state == "failed")
    connection.execute(sa.delete(servable_replicas).where(failed))


def unwant(database: Engine, version_id: str, engine_name: str | None = None) -> None:
    """Let engines release a version; they do so after a while. Unknown versions are no error."""
    query = sa.update(servables).where(servables.c.version == version_id)
    if engine_name is not None:
        query = query.where(servables.c.engine == engine_name)
    with write(database).begin() as connection:
        connection.execute(query.values(wanted=False, updated_at_us=now_us()))


def list_servables(database: Engine, engine_name: str | None = None) -> list[Servable]:
    """All rows, wanted or not, by engine and version."""
    query = sa.select(servables).order_by(servables.c.engine, servables.c.version)
    if engine_name is not None:
        query = query.where(servables.c.engine == engine_name)
    with database.connect() as connection:
        return [Servable(**row) for row in connection.execute(query).mappings()]


def reports(database: Engine, version_id: str | None = None) -> list[Report]:
    """What replicas say, of one version or of all; their presence rows are left out."""
    query = sa.select(servable_replicas).where(servable_replicas.c.version != PRESENCE)
    if version_id is not None:
        query = query.where(servable_replicas.c.version == version_id)
    with database.connect() as connection:
        return [Report(**row) for row in connection.execute(query).mappings()]


def engine_lives(database: Engine, engine_name: str, *, live_after_s: float = DEFAULTS.live_after_s) -> bool:
    """True when a replica of the engine has said so lately."""
    r = servable_replicas.c
    since_us = now_us() - round(live_after_s * SECOND_US)
    query = sa.select(r.replica_id).where(r.engine == engine_name, r.version == PRESENCE, r.heartbeat_us >= since_us)
    with database.connect() as connection:
        return connection.execute(query.limit(1)).first() is not None


def ready(database: Engine, version_id: str, *, live_after_s: float = DEFAULTS.live_after_s) -> bool:
    """True when every live replica of every engine that should hold the version does, and one lives."""
    return _readiness(database, version_id, live_after_s)[0]


def why_not_ready(database: Engine, version_id: str, *, live_after_s: float = DEFAULTS.live_after_s) -> str | None:
    """What keeps a version from answering; `None` when it is ready."""
    try:
        done, said = _readiness(database, version_id, live_after_s)
    except NotFoundError as error:
        return str(error)
    if done:
        return None
    refused = next((report.reason for report in said if report.state == "failed"), None)
    return f"an engine refused it: {refused}" if refused is not None else f"it is not ready ({_states(said)})"


def _states(said: Sequence[Report]) -> str:
    return ", ".join(f"{r.engine}/{r.replica_id} {r.state}" for r in said) or "no replica has seen it"


def wait_ready(
    database: Engine,
    version_id: str,
    timeout_s: float,
    *,
    poll_s: float = DEFAULTS.poll_interval_s,
    live_after_s: float = DEFAULTS.live_after_s,
) -> None:
    """Wait until a version is ready.

    Raises:
        NotFoundError: nobody wants it.
        ConflictError: a replica refused it; the message has the reason.
        UnavailableError: it was not ready in time; the message has the state of each replica.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        done, said = _readiness(database, version_id, live_after_s)
        if done:
            return
        failures = [report for report in said if report.state == "failed"]
        if failures:
            raise ConflictError(f"version {version_id} cannot be served: {failures[0].reason}")
        if time.monotonic() >= deadline:
            raise UnavailableError(f"version {version_id} was not ready after {timeout_s:g} s ({_states(said)})")
        time.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))


def _readiness(database: Engine, version_id: str, live_after_s: float) -> tuple[bool, Sequence[Report]]:
    """Ready or not, and what the live replicas of the wanting engines say."""
    since_us = now_us() - round(live_after_s * SECOND_US)
    r = servable_replicas.c
    with database.connect() as connection:
        wanting = sa.select(servables.c.engine).where(servables.c.version == version_id, servables.c.wanted)
        engines = set(connection.execute(wanting).scalars())
        if not engines:
            raise NotFoundError(
                f"no engine is asked to hold version {version_id}; a rollout asks one, or an engine's "
                "`serve.engines.<name>.models` names it"
            )
        speaks = (r.heartbeat_us >= since_us) | (r.state == "idle")
        mine = sa.select(servable_replicas).where(r.engine.in_(engines), speaks)
        rows = [Report(**row) for row in connection.execute(mine).mappings()]
    rows = _without_outlived(rows)
    present = {(row.engine, row.replica_id) for row in rows if row.version == PRESENCE}
    said = [row for row in rows if row.version == version_id and (row.engine, row.replica_id) in present]
    holding = {(row.engine, row.replica_id) for row in said if row.state in ("ready", "idle")}
    everywhere = bool(present) and holding == present and {engine for engine, _ in present} == engines
    return everywhere, said


def _without_outlived(rows: Sequence[Report]) -> list[Report]:
    """Without what idle replicas left behind of engines that have a living one."""
    living = {row.engine for row in rows if row.version == PRESENCE and row.state != "idle"}
    return [row for row in rows if row.state != "idle" or row.engine not in living]


def asleep(database: Engine, *, live_after_s: float = DEFAULTS.live_after_s) -> set[str]:
    """Idle engines that are asked for a version which they did not hold when they went: somebody must wake them."""
    since_us = now_us() - round(live_after_s * SECOND_US)
    r = servable_replicas.c
    with database.connect() as connection:
        speaks = (r.heartbeat_us >= since_us) | (r.state == "idle")
        rows = [Report(**row) for row in connection.execute(sa.select(servable_replicas).where(speaks)).mappings()]
        if not any(row.state == "idle" for row in rows):
            return set()
        wanted = connection.execute(sa.select(servables.c.engine, servables.c.version).where(servables.c.wanted)).all()
    left = [row for row in _without_outlived(rows) if row.state == "idle"]
    idle = {row.engine for row in left}
    held = {(row.engine, row.version) for row in left}
    return {engine for engine, version in wanted if engine in idle and (engine, version) not in held}
