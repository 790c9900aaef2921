"""Who is erased, and how far that is."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError
from cluster.tables import erasures

PUBLISH = "publish"
"""Lock of the database under which a dataset gets its name: an erasure finds the dataset, or is found by it."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who is erased."""

    tenant: str
    user_id: str
    """The pseudonym (`data.feedback.pseudonym`)."""


def read_erasure(engine: Engine, person: Person) -> Any:
    """How far the erasure of a person is: its row of `erasures`, or `None`."""
    with engine.connect() as connection:
        return connection.execute(sa.select(erasures).where(is_of(person))).mappings().first()


def is_of(person: Person) -> sa.ColumnElement[bool]:
    """The condition on `erasures` for a person."""
    return sa.and_(erasures.c.tenant == person.tenant, erasures.c.user_id == person.user_id)


def erased_users(engine: Engine, tenant: str) -> frozenset[str]:
    """Pseudonyms of all who were erased.

    Raises:
        ConflictError: an erasure is under way, or was interrupted: what is read may still hold the person.
    """
    with engine.connect() as connection:
        query = sa.select(erasures.c.user_id, erasures.c.state).where(erasures.c.tenant == tenant)
        known = connection.execute(query).all()
    if unfinished := [row.user_id for row in known if row.state != "done"]:
        raise ConflictError(f"the erasure of {unfinished[0]} is not finished; wait for it or run `rayloop erase` again")
    return frozenset(row.user_id for row in known)
