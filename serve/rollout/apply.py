"""Records a decision and applies it: each effect in order, any of them twice without harm.

What is recorded and not yet settled is applied again by whoever comes next; a person's decision that was recorded
meanwhile goes before it.
"""

import logging
from typing import Any

from cluster.clock import SECOND_US
from cluster.errors import ConflictError
from serve.rollout.placement import route_at, route_left, route_promoted, standing
from serve.rollout.state import Decision
from serve.rollout.steps import WRITER, Steps
from serve.rollout.store import Rollout, get_rollout
from serve.routes import Route, read_route

log = logging.getLogger(__name__)

ATTEMPTS = 5  # a write that lost a race is made again after another reading


def record_and_apply(steps: Steps, rollout: Rollout, decision: Decision, record: dict[str, Any], actor: str) -> Rollout:
    has_effects = decision.outcome in ("start", "advance", "unfreeze", "promote", "rollback", "fail")
    rollout = steps.record(rollout, decision, evidence=record, actor=actor, pending=has_effects)
    log.info("rollout %s: %s (%s)", rollout.rollout_id, decision.outcome, decision.reason)
    return apply_until_settled(steps, rollout) if has_effects else rollout


def apply_until_settled(steps: Steps, rollout: Rollout) -> Rollout:
    """Apply what is pending; where another process settled or replaced it meanwhile, go by that."""
    for attempt in range(ATTEMPTS):
        try:
            return apply_pending(steps, rollout)
        except ConflictError:
            rollout = get_rollout(steps.engine, rollout.rollout_id)
            if rollout.pending_decision is None or attempt == ATTEMPTS - 1:
                return rollout
    raise AssertionError("unreachable")


def apply_pending(steps: Steps, rollout: Rollout) -> Rollout:
    """Do everything the recorded decision calls for, then settle; safe to repeat from the start."""
    pending = rollout.pending_decision
    assert pending is not None
    decision = Decision.from_json(pending["decision"])
    number, actor = pending["number"], pending["actor"]
    if decision.outcome in ("start", "advance", "unfreeze"):
        done = _apply_share(steps, rollout, decision, pending["route"])
    elif decision.outcome == "promote":
        return _apply_promotion(steps, rollout, decision, pending)
    elif not _can_restore(steps, rollout, decision):
        return rollout
    else:
        _apply_end(steps, rollout, decision, number, actor)
        done = True
    if not done:
        return _give_way(steps, rollout)
    if not _is_confirmed(steps, rollout, pending["at_us"]):
        return rollout
    return steps.finish(rollout, decision)


def _apply_share(steps: Steps, rollout: Rollout, decision: Decision, seen: dict[str, Any] | None) -> bool:
    takes_back = decision.outcome == "unfreeze"

    def change_of(route: Route) -> dict[str, Any]:
        return route_at(route, rollout, decision.share) | ({"pinned": False} if takes_back else {})

    return steps.set_route(rollout, change_of, decision.reason, None if takes_back else seen)


def _apply_promotion(steps: Steps, rollout: Rollout, decision: Decision, pending: dict[str, Any]) -> Rollout:
    """The alias moves once every router gives the candidate to everybody; until they can be read, it waits."""
    candidate, number, actor = rollout.experiment.candidate, pending["number"], pending["actor"]
    if not steps.set_route(rollout, lambda _: route_promoted(rollout), decision.reason, pending["route"]):
        return _give_way(steps, rollout)
    if not steps.is_shown(rollout):
        return _wait_for_routers(steps, rollout, pending["at_us"])
    steps.set_champion(rollout, candidate, actor, decision.reason)
    steps.note_decision(rollout, number)
    details = {"rollout_id": rollout.rollout_id, "previous": rollout.experiment.stable}
    steps.announce(
        rollout,
        number,
        {"version": candidate, "change": "alias", "alias": "champion", "details": details},
    )
    steps.end_experiment(rollout, "promote")
    return steps.finish(rollout, decision)


def _wait_for_routers(steps: Steps, rollout: Rollout, decided_us: int) -> Rollout:
    """A promotion that nobody can see is none: past the limit of holds it is taken back."""
    waited_s = (steps.clock() - decided_us) / SECOND_US
    log.warning("rollout %s: the routers do not show its promotion after %.0f s", rollout.rollout_id, waited_s)
    if waited_s <= rollout.settings.rollout.hold_limit_s:
        return rollout
    reason = f"the routers did not show its promotion in {waited_s:.0f} s"
    decision = Decision(
        "rollback", "unconfirmed", reason, "rolling_back", rollout.stage, 0.0,
        ends_as="inconclusive", details={"restores": True},
    )  # fmt: skip
    route = read_route(steps.engine, rollout.key)
    record = {"route_revision": route.revision, "route": standing(route, rollout)}
    return record_and_apply(steps, rollout, decision, record, WRITER)


def _can_restore(steps: Steps, rollout: Rollout, decision: Decision) -> bool:
    """Whether users can be sent to stable now: a previous champion that was unloaded must first be loaded again."""
    if not (decision.details.get("restores") and rollout.progress.get("released")):
        return True
    stable = rollout.experiment.stable
    status, said = steps.servables.status(stable)
    if status in ("absent", "failed"):
        steps.want(stable)
    if status != "ready":
        log.warning("rollout %s: %s is being loaded to come back (%s)", rollout.rollout_id, stable, said or status)
    return status == "ready"


def _apply_end(steps: Steps, rollout: Rollout, decision: Decision, number: int, actor: str) -> None:
    """Everybody back to stable; a promotion, finished or not, is undone."""
    experiment = rollout.experiment
    _leave_route(steps, rollout, decision.reason)
    if decision.details.get("restores") and read_route(steps.engine, rollout.key).stable == experiment.stable:
        steps.set_champion(rollout, experiment.stable, actor, decision.reason)
    if decision.outcome == "rollback":
        steps.mark_rolled_back(rollout, decision.reason)
        steps.note_decision(rollout, number)
        details = {"rollout_id": rollout.rollout_id, "reason": decision.reason}
        steps.announce(rollout, number, {"version": experiment.candidate, "change": "blocked", "details": details})
    steps.end_experiment(rollout, decision.ends_as or "keep")
    steps.unwant(experiment.candidate)


def _leave_route(steps: Steps, rollout: Rollout, reason: str) -> None:
    """Take the candidate off the route, unless a person has put something else there."""
    for _ in range(ATTEMPTS):
        if route_left(read_route(steps.engine, rollout.key), rollout) is None:
            return
        if steps.set_route(rollout, lambda route: route_left(route, rollout) or {}, reason, None):
            return
    raise ConflictError(f"route {rollout.key} keeps changing; the candidate is still on it")


def _is_confirmed(steps: Steps, rollout: Rollout, decided_us: int) -> bool:
    """True once the routers show the route, or have had time enough to."""
    if steps.is_shown(rollout):
        return True
    waited_s = (steps.clock() - decided_us) / SECOND_US
    if waited_s < rollout.settings.rollout.confirm_timeout_s:
        return False
    log.warning("routers do not show the route of %s after %.0f s; going on", rollout.rollout_id, waited_s)
    return True


def _give_way(steps: Steps, rollout: Rollout) -> Rollout:
    """Somebody changed the route between the decision and its effect: theirs stands, the rollout holds."""
    route = read_route(steps.engine, rollout.key)
    stage = rollout.stage
    share = rollout.settings.share(stage)
    reason = f"the route was changed by {route.updated_by} first"
    decision = Decision("hold", "gave_way", reason, "holding", stage, share)
    record = {"route_revision": route.revision, "route": standing(route, rollout)}
    return steps.record(rollout, decision, evidence=record, actor=WRITER, pending=False)
