"""Who may answer users: a version that every live replica of its engine holds and that was trained with the agent's
prompt, or that an endpoint is configured for.

Routes are checked when they are written, by whoever lets a person or a deployment config write them; the rollout
controller waits for its candidate by itself.
"""

from collections.abc import Mapping

from sqlalchemy.engine import Engine

from cluster.errors import ConflictError
from cluster.settings.serving import EngineEndpoint
from serve.prompt_parity import why_other_prompt
from serve.routes import Check, Route
from serve.servables import why_not_ready


class NotReadyError(ConflictError):
    """A route would send users to a version that cannot answer them, or not yet."""


def only_ready(database: Engine, endpoints: Mapping[str, EngineEndpoint], *, live_after_s: float) -> Check:
    """Refuses to let a version begin to answer that is not ready; those that answer already are left to others.

    The check raises `NotReadyError` with the reason.
    """
    configured = {version for endpoint in endpoints.values() for version in endpoint.models}

    def check(before: Route | None, after: Route) -> None:
        for version in sorted(_answering(after) - _answering(before) - configured):
            reason = why_not_ready(database, version, live_after_s=live_after_s)
            reason = reason or why_other_prompt(database, after.key, version)
            if reason is not None:
                raise NotReadyError(f"version {version} may not answer for {after.key}: {reason}")

    return check


def _answering(route: Route | None) -> set[str]:
    """The versions that users get; a shadow's answers nobody sees."""
    return set() if route is None else {route.stable, *(arm.version for arm in route.live if arm.share > 0)}
