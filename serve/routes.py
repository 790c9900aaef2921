"""The traffic split: one row a route, equal writers, compare-and-swap. `serve.split` says how users are split.

A write is `update … where revision = ?` and leaves a `route.changed` event in the same transaction. Writers
are the deployment config (`serve.deployment_config`), a person (`rayloop route`) and the rollout controller; all
go through `write_route` or `write_in`, so they obey the same rules.
"""

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.tables import routes
from data.events import Event
from data.log import EventLog
from serve.split import SPLIT_FIELDS, Arm, changed_arms, check_arms, check_share, live_arms, total

CHANGEABLE = ("stable", *SPLIT_FIELDS, "max_share", "shadow", "experiment_id", "salt", "pinned")
CONFIG_WRITER = "config"
VERSION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}/[1-9][0-9]{0,17}$"


@dataclass(frozen=True, slots=True)
class RouteKey:
    """Which route: whose, for which agent, in which modality."""

    tenant: str
    agent: str
    modality: str = "text"

    def __str__(self) -> str:
        return f"{self.agent} ({self.modality}, tenant {self.tenant})"


@dataclass(frozen=True, slots=True)
class Route:
    """One row: who answers, and which users the candidates have."""

    tenant: str
    agent: str
    modality: str
    stable: str
    arms: tuple[Arm, ...] = ()
    """The candidates, in the order of their buckets."""
    max_share: float = 1.0
    """Ceiling of all candidates together, set by the deployment config; nobody else can pass it."""
    shadow: str | None = None
    experiment_id: str | None = None
    """What stable's answers are recorded for; with several candidates, each has an experiment of its own."""
    salt: str = ""
    pinned: bool = False
    """Everybody gets stable, whatever the shares."""
    revision: int = 0
    config_hash: str | None = None
    config_generation: int | None = None
    updated_at_us: int = 0
    updated_by: str = ""
    live: tuple[Arm, ...] = field(init=False, repr=False, compare=False)
    """The candidates in force: none when pinned, never above the ceiling. Worked out once, read at every request."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "live", () if self.pinned else live_arms(self.arms, self.max_share))

    @property
    def key(self) -> RouteKey:
        """What names this route."""
        return RouteKey(self.tenant, self.agent, self.modality)

    @property
    def candidate(self) -> str | None:
        """The version on trial; the first where there are several."""
        return self.arms[0].version if self.arms else None

    @property
    def share(self) -> float:
        """Share of users on candidates, as written."""
        return total(self.arms)

    @property
    def live_share(self) -> float:
        """The same as in force."""
        return total(self.live)

    @property
    def versions(self) -> tuple[str, ...]:
        """Every version the route names."""
        named = (self.stable, *(arm.version for arm in self.arms), self.shadow)
        return tuple(version for version in named if version)

    @property
    def split(self) -> list[tuple[str | None, float, float]] | None:
        """Experiment, start and share of each candidate in force, to be recorded with a request. `None` where the
        propensity tells it all: one candidate, from the first bucket on."""
        if not self.live or (len(self.live) == 1 and self.live[0].start == 0.0):
            return None
        return [(arm.experiment_id, arm.start, arm.share) for arm in self.live]

    def columns(self) -> dict[str, Any]:
        """The row, which is what events say of it too."""
        values = {own.name: getattr(self, own.name) for own in fields(self) if own.init}
        return values | {"arms": [arm.as_json() for arm in self.arms]}

    @staticmethod
    def from_row(row: Mapping[Any, Any]) -> "Route":
        """Undoes `columns`."""
        return Route(**{**row, "arms": tuple(Arm(**arm) for arm in row["arms"])})


Check = Callable[[Route | None, Route], None]
"""Sees a route before and after a change, inside its transaction; raises where it may not be (`serve.readiness`)."""


def read_routes(engine: Engine, tenant: str | None = None) -> list[Route]:
    """Every route, of one tenant or of all, ordered by key."""
    query = sa.select(routes).order_by(routes.c.tenant, routes.c.agent, routes.c.modality)
    if tenant is not None:
        query = query.where(routes.c.tenant == tenant)
    with engine.connect() as connection:
        return [Route.from_row(row) for row in connection.execute(query).mappings()]


def read_route(engine: Engine, key: RouteKey) -> Route:
    """One route.

    Raises:
        NotFoundError: there is none; the message names the known ones.
    """
    for route in (known := read_routes(engine, key.tenant)):
        if route.key == key:
            return route
    names = ", ".join(f"{r.agent} ({r.modality})" for r in known) or "none yet"
    raise NotFoundError(f"route {key} does not exist; known: {names}")


def write_route(
    engine: Engine,
    key: RouteKey,
    change: Mapping[str, Any],
    *,
    expected_revision: int,
    writer: str,
    reason: str | None = None,
    workspace: str = "default",
    check: Check | None = None,
) -> Route:
    """Change a route if it still has `expected_revision` (0: it does not exist yet).

    `writer` is `config`, `person:<name>` or `controller`. A candidate other than before gets a new salt
    unless the change brings one. `check` sees the route before and after, and may raise (`serve.readiness`).

    Raises:
        ConflictError: somebody else wrote first, or the share would pass the ceiling.
        InputError: a value that breaks a rule.
    """
    with write(engine).begin() as connection:
        before = read_in(connection, key)
        after = changed(before, key, change, writer)
        if check is not None:
            check(before, after)
        return write_in(engine, connection, before, after, expected_revision, writer, reason, workspace)


def update_route(
    engine: Engine,
    key: RouteKey,
    change: Mapping[str, Any],
    *,
    writer: str,
    reason: str | None = None,
    workspace: str = "default",
    check: Check | None = None,
) -> Route:
    """Change a route whatever its revision is, as a person does who has just looked at it."""
    with write(engine).begin() as connection:
        before = read_in(connection, key)
        after = changed(before, key, change, writer)
        if check is not None:
            check(before, after)
        revision = before.revision if before else 0
        return write_in(engine, connection, before, after, revision, writer, reason, workspace)


def is_route(key: RouteKey) -> sa.ColumnElement[bool]:
    """The row of a route."""
    return (routes.c.tenant == key.tenant) & (routes.c.agent == key.agent) & (routes.c.modality == key.modality)


def read_in(connection: Connection, key: RouteKey) -> Route | None:
    """A route, kept from other writers until the transaction ends."""
    query = sa.select(routes).where(is_route(key)).with_for_update()
    row = connection.execute(query).mappings().first()
    return Route.from_row(row) if row else None


def changed(before: Route | None, key: RouteKey, change: Mapping[str, Any], writer: str) -> Route:
    """The row after the change, checked against every rule.

    Raises:
        InputError, ConflictError: which one it breaks.
    """
    for name in change:
        if name not in CHANGEABLE:
            raise InputError(name, change[name], f"is not a field of a route ({', '.join(CHANGEABLE)})", "leave it out")
    if before is None and not change.get("stable"):
        raise InputError("stable", change.get("stable"), f"must name a version, as {key} is new", "name one")
    start = before or Route(key.tenant, key.agent, key.modality, stable=str(change["stable"]), salt=uuid.uuid4().hex)
    values = {name: value for name, value in change.items() if name not in SPLIT_FIELDS}
    after = replace(start, **values | _new_split(start, change))
    _check(start, after, writer)
    return after


def _new_split(before: Route, change: Mapping[str, Any]) -> dict[str, Any]:
    """Arms, salt and experiment: users are reshuffled for a version that was not on trial, and once none is."""
    arms = changed_arms(before.arms, change)
    was, versions = {arm.version for arm in before.arms}, {arm.version for arm in arms}
    goes_on = was == versions or (bool(versions) and versions < was)
    salt = change.get("salt", before.salt if goes_on else uuid.uuid4().hex)
    experiment_id = change.get("experiment_id", before.experiment_id if goes_on else None)
    if len(arms) == 1 and "arms" not in change:
        arms = (replace(arms[0], experiment_id=experiment_id),)
    return {"arms": arms, "salt": salt, "experiment_id": experiment_id}


def _check(before: Route, after: Route, writer: str) -> None:
    for name in ("stable", "candidate", "shadow"):
        version = getattr(after, name)
        if version is not None and not re.fullmatch(VERSION_PATTERN, version):
            raise InputError(name, version, "is not the name of a version", "write it as `rayloop register` says it")
    check_share("max_share", after.max_share)
    check_arms(after.arms, after.stable)
    if writer == CONFIG_WRITER:
        return
    if after.max_share != before.max_share:
        raise ConflictError(
            f"max_share={after.max_share} of {after.key} belongs to the deployment config; change it there"
        )
    if after.share > after.max_share and after.share > before.share:
        raise ConflictError(
            f"share={after.share:g} of {after.key} would pass the ceiling {after.max_share:g} of the deployment config"
        )
    promoted = after.stable != before.stable and after.stable in before.versions[1:]
    if promoted and after.max_share < 1:
        raise ConflictError(
            f"promoting {after.stable} on {after.key} would pass the ceiling {after.max_share:g} "
            "of the deployment config"
        )


def write_in(
    engine: Engine,
    connection: Connection,
    before: Route | None,
    after: Route,
    expected_revision: int,
    writer: str,
    reason: str | None,
    workspace: str,
) -> Route:
    """Write a route as `changed` made it, with its event.

    Raises:
        ConflictError: somebody else wrote first.
    """
    found = before.revision if before else 0
    if found != expected_revision:
        raise ConflictError(
            f"route {after.key} has revision {found}, not {expected_revision}: somebody else changed it; read it again"
        )
    after = replace(after, revision=found + 1, updated_at_us=now_us(), updated_by=writer)
    if before is None:
        try:
            connection.execute(routes.insert().values(**after.columns()))
        except sa.exc.IntegrityError:
            raise ConflictError(f"route {after.key} was created by somebody else; read it again") from None
    else:
        where = is_route(after.key) & (routes.c.revision == expected_revision)
        if not connection.execute(routes.update().where(where).values(**after.columns())).rowcount:
            raise ConflictError(f"route {after.key} was changed by somebody else; read it again")
    body: dict[str, Any] = {"writer": writer, "after": after.columns(), "revision": after.revision}
    if before is not None:
        body["before"] = before.columns()
    if reason is not None:
        body["reason"] = reason
    event = Event("route.changed", after.tenant, workspace, body, agent=after.agent)
    EventLog(engine).append_in(connection, [event])
    return after
