"""What a job had to say in the course of its life, numbered from 1 without gaps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.tables import job_events

Level = Literal["info", "warn", "error"]
Kind = Literal["message", "metrics", "checkpoint"]
TRIES = 20  # two writers may reach for the same number


@dataclass(frozen=True)
class JobEvent:
    """One thing a job said."""

    job_id: str
    number: int
    at_us: int
    level: str
    kind: str
    message: str
    data: dict[str, Any] | None


def note(
    engine: Engine,
    job_id: str,
    message: str,
    *,
    level: Level = "info",
    kind: Kind = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Add an event; several processes may do so at once."""
    number = sa.select(sa.func.coalesce(sa.func.max(job_events.c.number), 0) + 1).where(job_events.c.job_id == job_id)
    row = {
        "job_id": job_id,
        "number": number.scalar_subquery(),
        "at_us": now_us(),
        "level": level,
        "kind": kind,
        "message": message[:4000],
        "data": None if data is None else dict(data),
    }
    for attempt in range(TRIES):
        try:
            with write(engine).begin() as connection:
                connection.execute(job_events.insert().values(row))
            return
        except sa.exc.IntegrityError:
            if attempt == TRIES - 1:
                raise


def read_events(
    engine: Engine,
    job_id: str,
    *,
    after: int = 0,
    before: int | None = None,
    kind: Kind | None = None,
    limit: int = 100,
    newest_first: bool = False,
) -> list[JobEvent]:
    """Events numbered above `after` and below `before`."""
    e = job_events.c
    query = sa.select(job_events).where(e.job_id == job_id, e.number > after)
    if before is not None:
        query = query.where(e.number < before)
    if kind is not None:
        query = query.where(e.kind == kind)
    query = query.order_by(e.number.desc() if newest_first else e.number).limit(limit)
    with engine.connect() as connection:
        return [JobEvent(**row) for row in connection.execute(query).mappings()]
