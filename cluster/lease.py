"""Leases in the database: of several processes that could do a thing, one does it."""

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US
from cluster.database import write
from cluster.tables import leases


def acquire_lease(engine: Engine, name: str, holder: str, duration_s: float, now_us: int) -> bool:
    """Take or renew a lease; `False` while somebody else holds it. It is renewed once half of it is over."""
    duration_us = round(duration_s * SECOND_US)
    values = {"holder": holder, "expires_us": now_us + duration_us}
    mine = (leases.c.name == name) & (leases.c.holder == holder)
    with engine.connect() as connection:
        expires_us = connection.execute(sa.select(leases.c.expires_us).where(mine)).scalar()
    if expires_us is not None and expires_us - now_us > duration_us / 2:
        return True
    free = (leases.c.name == name) & ((leases.c.holder == holder) | (leases.c.expires_us <= now_us))
    try:
        with write(engine).begin() as connection:
            if connection.execute(leases.update().where(free).values(**values)).rowcount:
                return True
            known = connection.execute(sa.select(leases.c.holder).where(leases.c.name == name)).first()
            if known is None:
                connection.execute(leases.insert().values(name=name, **values))
            return known is None
    except sa.exc.IntegrityError:
        return False  # another controller inserted it at the same moment


def release_lease(engine: Engine, name: str, holder: str) -> None:
    """Give a lease back, if it is ours."""
    with write(engine).begin() as connection:
        connection.execute(leases.delete().where(leases.c.name == name, leases.c.holder == holder))


def lease_holder(engine: Engine, name: str, now_us: int) -> str | None:
    """Who holds a lease now."""
    query = sa.select(leases.c.holder).where(leases.c.name == name, leases.c.expires_us > now_us)
    with engine.connect() as connection:
        return connection.execute(query).scalar()
