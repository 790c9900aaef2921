"""An alias of a version moves by an event, which is written first; then MLflow follows.

A crash between the two leaves a move that was announced and not made: whoever wanted it comes again and announces it
again. The other way round there would be a move that no log knows of.
"""

from typing import Any

from sqlalchemy.engine import Engine

from cluster.registry import Registry, Version
from data.events import Event, parse_body
from data.log import EventLog


def give_alias(engine: Engine, registry: Registry, version: Version, alias: str, *, actor: str, reason: str) -> None:
    """Point an alias at a version.

    Raises:
        ConflictError: the version may not have it; nothing is written.
    """
    registry.check_alias(version, alias)
    _announce(engine, registry, version, {"change": "alias", "alias": alias}, actor=actor, reason=reason)
    registry.set_alias(version.model, alias, version, actor=actor, reason=reason)


def take_alias(engine: Engine, registry: Registry, version: Version, alias: str, *, actor: str, reason: str) -> None:
    """Take an alias from the version that has it."""
    _announce(engine, registry, version, {"change": "alias_removed", "alias": alias}, actor=actor, reason=reason)
    registry.remove_alias(version.model, alias, actor=actor, reason=reason)


def _announce(
    engine: Engine, registry: Registry, version: Version, change: dict[str, Any], *, actor: str, reason: str
) -> None:
    settings = registry.settings
    body = {
        "version": version.id,
        "adapter_sha256": version.adapter_sha256,
        "dataset_hash": version.dataset_hash,
        "details": {"actor": actor, "reason": reason},
        **change,
    }
    tenant = version.tags.get("rayloop.tenant", settings.tenant)
    parsed = parse_body("model.updated", body)
    event = Event("model.updated", tenant, settings.workspace, parsed, agent=version.model)
    EventLog(engine).append([event])
