"""The deployment config that was accepted last, kept for routers that start after a bad one.

Serve hands a starting replica the newest document, even one that every replica refused. Routes are in their table
whatever comes; the engines and ceilings of the last good document would be known to the older replicas alone.
"""

import logging

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.errors import ConfigError
from cluster.tables import router_configs
from serve.deployment_config import RouterConfig, parse_config

log = logging.getLogger(__name__)


def keep_accepted(database: Engine, tenant: str, config: RouterConfig) -> None:
    """Remember a config; the same one again writes nothing."""
    document = config.model_dump(mode="json", exclude_unset=True)
    own = router_configs.c.tenant == tenant
    with write(database).begin() as connection:
        if connection.execute(sa.select(router_configs.c.document).where(own)).scalar() == document:
            return
        connection.execute(sa.delete(router_configs).where(own))
        row = {"tenant": tenant, "document": document, "accepted_at_us": now_us()}
        connection.execute(sa.insert(router_configs).values(row))


def last_accepted(database: Engine, tenant: str) -> RouterConfig | None:
    """The last config, if there is one that can still be read."""
    query = sa.select(router_configs.c.document).where(router_configs.c.tenant == tenant)
    with database.connect() as connection:
        document = connection.execute(query).scalar()
    if document is None:
        return None
    try:
        return parse_config(document)
    except ConfigError as error:
        log.warning("the deployment config that was accepted last cannot be read any more (%s)", error)
        return None
