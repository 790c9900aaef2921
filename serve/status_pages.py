"""What a router says of itself: whether it is ready, what can be asked for, how routes and their versions stand."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.anomalies import AnomalyWatch
from serve.keys import Key
from serve.routes import Route
from serve.snapshot import Snapshot, Watcher

STATUS = "/v1/agents/status"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StatusPages:
    """The documents of one router replica."""

    watcher: Watcher
    anomalies: AnomalyWatch
    breaker_states: Callable[[], Mapping[str, bool]]
    """Version -> True while it is left alone."""
    operator: str
    """The tenant that runs the installation."""

    def health(self) -> tuple[int, Json]:
        """Status and document: ready once routes and keys were read."""
        snapshot = self.watcher.current
        ready = bool(snapshot.read_at)
        document: Json = {"status": "ok" if ready else "not ready"}
        if ready:
            document["snapshot_age_s"] = round(time.monotonic() - snapshot.read_at, 3)
        if self.watcher.rejection is not None:
            document["config_rejected"] = True  # the reason names agents, and nobody has shown a key
        return (200 if ready else 503), document

    def models(self, key: Key, snapshot: Snapshot) -> Json:
        """What the key's tenant may name as `model`."""
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": key.tenant}
            for name in snapshot.known_models(key.tenant)
        ]
        return {"object": "list", "data": models}

    def status(self, key: Key, snapshot: Snapshot) -> Json:
        """Every route of the key's tenant."""
        open_breakers = self.breaker_states()
        routes = [route for route in snapshot.routes.values() if route.tenant == key.tenant]
        agents = [self._agent(route, snapshot, open_breakers) for route in routes]
        own = key.tenant == self.operator  # whose deployment configs these are
        return {"object": "list", "data": agents, "config_rejected": self.watcher.rejection if own else None}

    def _agent(self, route: Route, snapshot: Snapshot, open_breakers: Mapping[str, bool]) -> Json:
        return {
            "agent": route.agent,
            "modality": route.modality,
            "stable": route.stable,
            "candidate": route.candidate,
            "share": route.live_share,
            "arms": [arm.as_json() for arm in route.live],
            "max_share": route.max_share,
            "shadow": route.shadow,
            "pinned": route.pinned,
            "experiment_id": route.experiment_id,
            "revision": route.revision,
            "updated_by": route.updated_by,
            "versions": {version: _health_of(snapshot, version, open_breakers) for version in route.versions},
            "anomalies": [
                {"version": a.version, "signal": a.signal, "value": a.value, "limit": a.limit}
                for a in self.anomalies.current
                if a.route.key == route.key
            ],
        }


def _health_of(snapshot: Snapshot, version: str, open_breakers: Mapping[str, bool]) -> Json:
    return {
        "served": version in snapshot.targets,
        "replicas": dict(snapshot.health.get(version, {})),
        "breaker_open": open_breakers.get(version, False),
    }
