"""Who is erased, and how far that is."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.tables import erasures


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
