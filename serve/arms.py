"""Which version a request is for: a pure decision from a snapshot.

`model` names an agent, whose route then splits users between its versions, or a version itself, which is
nobody's experiment.
"""

from dataclasses import dataclass
from typing import Literal

from serve.assignment import assign_request
from serve.openai import ApiError, unknown_model
from serve.routes import Route, RouteKey
from serve.snapshot import Snapshot, Target
from serve.split import live_arms

PlannedArm = Literal["stable", "candidate", "shadow", "none"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Who should answer, who stands in, and what the record says about it."""

    requested: str
    agent: str
    version: str
    """The version assigned."""
    target: Target | None
    """Where it is served; `None` when no engine holds it."""
    arm: PlannedArm
    fallback: Target | None = None
    """Stable, where the candidate is assigned."""
    route: Route | None = None
    experiment_id: str | None = None
    bucket: float | None = None
    propensity: float | None = None
    unit: Literal["user", "session", "request"] | None = None


def plan(
    snapshot: Snapshot,
    tenant: str,
    model: str,
    *,
    modality: str,
    user: str | None,
    session: str | None,
    request: str,
) -> Plan:
    """The plan of one request. `user` is a pseudonym.

    Raises:
        ApiError: 404 for a model that the tenant does not have.
    """
    route = snapshot.routes.get(RouteKey(tenant, model, modality)) or snapshot.routes.get(RouteKey(tenant, model))
    if route is not None:
        return _routed(snapshot, route, model, user, session, request)
    target = snapshot.targets.get(model)
    if target is None or not snapshot.visible(tenant, model):
        raise unknown_model(model, snapshot.known_models(tenant))
    return Plan(model, target.version.rpartition("/")[0], target.version, target, "none")


def _routed(snapshot: Snapshot, route: Route, model: str, user: str | None, session: str | None, request: str) -> Plan:
    stable = snapshot.targets.get(route.stable)
    if route.pinned:
        return _pinned(route, model, stable, user, session, request)
    made = assign_request(route.live, route.salt, route.tenant, user=user, session=session, request=request)
    arm = None if made.candidate is None else route.live[made.candidate]
    return Plan(
        requested=model,
        agent=route.agent,
        version=route.stable if arm is None else arm.version,
        target=stable if arm is None else snapshot.targets.get(arm.version),
        arm=made.arm,
        fallback=None if arm is None else stable,
        route=route,
        experiment_id=route.experiment_id if arm is None else arm.experiment_id,
        bucket=made.bucket,
        propensity=made.propensity,
        unit=made.unit,
    )


def _pinned(
    route: Route, model: str, stable: Target | None, user: str | None, session: str | None, request: str
) -> Plan:
    """Stable for everybody. Whoever it keeps from a candidate is moved by hand, which its experiment must know."""
    arms = live_arms(route.arms, route.max_share)
    made = assign_request(arms, route.salt, route.tenant, user=user, session=session, request=request)
    experiment_id = None if made.candidate is None else arms[made.candidate].experiment_id
    place = None if experiment_id is None else made.bucket
    return Plan(
        model, route.agent, route.stable, stable, "none", route=route, experiment_id=experiment_id, bucket=place
    )


def opponent(route: Route, served: str, *, compares: bool) -> str | None:
    """The version whose answer is held against one that `served` gave; `None` where nobody's is.

    The route's shadow answers everybody's requests over again, and stable those of users who have the shadow as their
    candidate: else only one side of an experiment would have wins. Where experiments `compares` wins, the only
    candidate is stable's shadow though the route names none.
    """
    shadow = route.shadow or (route.live[0].version if compares and len(route.live) == 1 else None)
    if shadow is None:
        return None
    wanted = route.stable if served == shadow else shadow
    return None if wanted == served else wanted


def not_served(version: str) -> ApiError:
    """503: the route names a version that no engine holds."""
    return ApiError(
        503,
        f"Version {version} is not served by any engine yet.",
        code="version_not_ready",
        retry_after_s=1.0,
    )
