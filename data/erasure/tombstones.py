"""Tombstones: what belongs to an erased person is refused when it comes again."""

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.errors import NotFoundError
from cluster.settings import Settings
from cluster.tables import erasures, events, tombstones
from data.erasure.person import Person, read_erasure
from data.log import LOOKUP_CHUNK, subject, take_append_lock

OWN_KINDS = ("interaction", "trajectory")
"""Kinds that make an interaction a person's own; what others said about it then goes with it."""


def raise_tombstone(engine: Engine, settings: Settings, person: Person) -> None:
    """Refuse what comes in from now on; the first thing that is durable."""
    from data.erasure.files import spooled

    if read_erasure(engine, person) is not None:
        return
    theirs = sa.select(events.c.seq).where(events.c.tenant == person.tenant, events.c.user_id == person.user_id)
    waiting = spooled(settings, person.tenant, person.user_id)
    with write(engine).begin() as connection:
        take_append_lock(connection)
        if connection.execute(theirs.limit(1)).first() is None and not waiting:
            raise NotFoundError(
                f"no event of this user in tenant {person.tenant!r}; nothing to erase: check the spelling"
            )
        bury(connection, person, [subject("user", person.user_id)])
        own = [event for event in waiting if event.kind in OWN_KINDS]
        bury(connection, person, (subject("interaction", e.interaction_id) for e in own if e.interaction_id))
        bury(connection, person, (subject("session", e.session_id) for e in own if e.session_id))
        values = {"state": "begun", "events": [], "started_at_us": now_us()}
        connection.execute(erasures.insert().values(tenant=person.tenant, user_id=person.user_id, **values))


def bury(connection: Connection, person: Person, subjects: Iterable[str]) -> None:
    """Refuse these subjects of the tenant from now on."""
    for start in range(0, len(listed := sorted(set(subjects))), LOOKUP_CHUNK):
        chunk = listed[start : start + LOOKUP_CHUNK]
        query = sa.select(tombstones.c.subject).where(
            tombstones.c.tenant == person.tenant, tombstones.c.subject.in_(chunk)
        )
        known = set(connection.execute(query).scalars())
        fresh = [s for s in chunk if s not in known]
        if fresh:
            rows = [{"tenant": person.tenant, "subject": s, "erased_at_us": now_us()} for s in fresh]
            connection.execute(tombstones.insert(), rows)
