"""Which revision of each route every router replica serves, told by the replicas themselves.

A replica writes its row when what it serves changes, and again before it would count as gone; a draining one goes on
until it ends. A rollout reads the rows back: only what every replica serves is in force.
"""

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.tables import router_replicas
from serve.routes import Route, RouteKey

FORGOTTEN_AFTER = 100
"""Rows of replicas that have been silent for so many times as long as makes them count as gone are deleted."""

r = router_replicas.c


class ReplicaReport:
    """The row of one replica."""

    def __init__(self, replica_id: str, live_after_s: float) -> None:
        self.replica_id = replica_id
        self._live_after_us = round(live_after_s * SECOND_US)
        self._said: dict[str, int] | None = None
        self._said_at_us = 0

    def tell(self, engine: Engine, routes: Mapping[RouteKey, Route]) -> None:
        """Say what is served, where that is news or the last word is getting old."""
        revisions, at_us = {str(key): route.revision for key, route in routes.items()}, now_us()
        if revisions == self._said and at_us - self._said_at_us < self._live_after_us / 3:
            return
        values = {"revisions": revisions, "heartbeat_us": at_us}
        old = r.heartbeat_us < at_us - FORGOTTEN_AFTER * self._live_after_us
        mine = r.replica_id == self.replica_id
        with write(engine).begin() as connection:
            if not connection.execute(router_replicas.update().where(mine).values(**values)).rowcount:
                connection.execute(router_replicas.insert().values(replica_id=self.replica_id, **values))
            connection.execute(router_replicas.delete().where(old))
        self._said, self._said_at_us = revisions, at_us

    def leave(self, engine: Engine) -> None:
        """The replica ends: nobody need wait for it."""
        with write(engine).begin() as connection:
            connection.execute(router_replicas.delete().where(r.replica_id == self.replica_id))


def is_served(engine: Engine, route: Route, live_after_s: float) -> bool:
    """Whether there are live router replicas, and each of them serves this revision of a route, or a later one."""
    since_us = now_us() - round(live_after_s * SECOND_US)
    with engine.connect() as connection:
        told = connection.execute(sa.select(r.revisions).where(r.heartbeat_us >= since_us)).scalars().all()
    return bool(told) and all(revisions.get(str(route.key), 0) >= route.revision for revisions in told)
