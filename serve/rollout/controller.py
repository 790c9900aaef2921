"""The rollout controller: a reconciler that may die anywhere and be replaced by anyone.

One tick of one rollout: finish what was decided earlier; else read state and evidence, decide, record the
decision in the log, apply it, read back what is served, settle. The decision is written first, so a
successor never decides again what has been decided, it only applies it again; every step may be done
twice. People's commands go through the same steps, so they work at once and without a controller.
"""

import logging
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US
from cluster.database import write
from cluster.errors import ConflictError, InputError, RayloopError
from cluster.lease import acquire_lease, release_lease
from cluster.registry import NEEDS_RETRAINING_TAG, RETRAIN
from cluster.settings import Settings
from serve.experiments.evidence import Evidence
from serve.experiments.exposures import AFTER
from serve.experiments.projection import Projection
from serve.experiments.readings import read_evidence
from serve.experiments.store import create_experiment
from serve.rollout.bandits import tick_bandits
from serve.rollout.decide import decide
from serve.rollout.state import LIVE, Decision, RolloutConfig
from serve.rollout.steps import WRITER, Steps, holds
from serve.rollout.store import Rollout, get_rollout, insert_rollout, live_rollouts, promoted_rollouts
from serve.routes import Route, RouteKey, read_route

log = logging.getLogger(__name__)

LEASE = "rollout-controller"
ATTEMPTS = 5  # a command that lost a race to the controller reads again and retries


class Controller:
    """Drives every live rollout of one database. Construct one a process; `tick` is not thread-safe."""

    def __init__(self, steps: Steps, settings: Settings) -> None:
        self.steps = steps
        self.settings = settings
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.projection = Projection(steps.engine, settings)

    def tick(self) -> bool:
        """Count the log and look at every live rollout; `False` when another controller is in charge.

        A rollout that fails is logged and left as it is (which is a hold) until the next tick.
        """
        duration_s = self.settings.rollout.lease_s
        if not acquire_lease(self.steps.engine, LEASE, self.holder, duration_s, self.steps.clock()):
            return False
        counted = self._count()
        window_us = round(self.settings.rollout.restore_window_s * SECOND_US)
        promoted = promoted_rollouts(self.steps.engine, self.steps.clock() - window_us)
        for rollout in [*live_rollouts(self.steps.engine), *promoted]:
            try:
                tick_rollout(self.steps, rollout, counted=counted)
            except RayloopError as error:
                log.warning("rollout %s stays as it is: %s", rollout.rollout_id, error)
            except sa.exc.SQLAlchemyError:
                log.exception("rollout %s stays as it is: its tick failed", rollout.rollout_id)
        if counted:
            tick_bandits(self.steps, self.settings)
        self.steps.servables.sync(self.steps.clock())
        return True

    def close(self) -> None:
        """Let another controller take over at once."""
        release_lease(self.steps.engine, LEASE, self.holder)

    def _count(self) -> bool:
        try:
            self.projection.catch_up()
        except (sa.exc.SQLAlchemyError, ValueError, ArithmeticError):
            log.exception("the log could not be counted; rollouts hold")
            return False
        return True


def tick_rollout(steps: Steps, rollout: Rollout, *, counted: bool = True) -> Rollout:
    """One step of one rollout; returns it as it is afterwards."""
    if rollout.pending_decision is not None:
        return _apply_until_settled(steps, rollout)
    if rollout.state == "pending":
        return _start_when_ready(steps, rollout)
    route = read_route(steps.engine, rollout.key)
    if rollout.state == "promoted":
        rollout = _release_previous(steps, rollout)
        if not holds(route, _route_promoted(rollout)):
            return rollout
    elif rollout.state not in LIVE:
        return rollout
    state = rollout.as_state(edited_by=_edited_by(rollout, route), max_share=route.max_share)
    evidence = _evidence(steps.engine, rollout) if counted else None
    now_us = steps.clock()
    decision = decide(state, evidence, rollout.settings, now_us)
    if not _is_news(rollout, decision):
        return rollout
    if decision.outcome in ("advance", "promote") and _needs_retraining(steps, rollout):
        return roll_back(steps, rollout.rollout_id, WRITER, RETRAIN)
    record = {
        "state": state.as_json(),
        "evidence": evidence.as_json() if evidence else None,
        "config": rollout.config,
        "now_us": now_us,
        "route_revision": route.revision,
    }
    return _record_and_apply(steps, rollout, decision, record, WRITER)


def _needs_retraining(steps: Steps, rollout: Rollout) -> bool:
    return NEEDS_RETRAINING_TAG in steps.versions.get(rollout.experiment.candidate).tags


def _release_previous(steps: Steps, rollout: Rollout) -> Rollout:
    """Let the engines drop the previous champion once it need not be warm any more."""
    age_s = (steps.clock() - rollout.stage_started_us) / SECOND_US
    if age_s < rollout.settings.rollout.warm_s or rollout.progress.get("released"):
        return rollout
    rollout = steps.remember(rollout, released=True)
    steps.unwant(rollout.experiment.stable)
    return rollout


def _evidence(engine: Engine, rollout: Rollout) -> Evidence | None:
    config = rollout.settings
    last = config.period(rollout.stage)
    is_over = rollout.state == "promoted"
    try:
        return read_evidence(
            engine,
            rollout.experiment.experiment_id,
            config.experiment,
            period=AFTER if is_over else last,
            periods=config.num_periods + is_over,
            control_period=last if is_over else None,
        )
    except (sa.exc.SQLAlchemyError, ValueError, ArithmeticError):
        log.exception("evidence of %s could not be read; it holds", rollout.rollout_id)
        return None


def _is_news(rollout: Rollout, decision: Decision) -> bool:
    """True for everything but a hold that says what the last decision said, or that it is early yet."""
    known = (rollout.progress.get("last_code"), "waiting", "watching")
    same = decision.to_state == rollout.state and decision.code in known
    return not same or decision.look is not None or decision.outcome not in ("hold", "await_approval")


def _edited_by(rollout: Rollout, route: Route) -> str | None:
    """Who moved the route away from where the rollout has put it, if anybody did."""
    expected = _route_at(rollout, rollout.settings.share(rollout.stage))
    as_put = holds(route, expected | {"pinned": False}) and route.live_share == expected["share"]
    return None if as_put else route.updated_by


def _route_at(rollout: Rollout, share: float) -> dict[str, Any]:
    """The route while the candidate has a share."""
    experiment = rollout.experiment
    return {
        "stable": experiment.stable,
        "candidate": experiment.candidate,
        "share": share,
        "experiment_id": experiment.experiment_id,
        "salt": experiment.salt,
    }


def _route_promoted(rollout: Rollout) -> dict[str, Any]:
    """The route once the candidate is stable. The experiment stays on it, so that its numbers go on being counted."""
    experiment = rollout.experiment
    return {
        "stable": experiment.candidate,
        "candidate": None,
        "share": 0.0,
        "experiment_id": experiment.experiment_id,
    }


def _start_when_ready(steps: Steps, rollout: Rollout) -> Rollout:
    """Bring the candidate up, try it, and give it its first users."""
    config, candidate = rollout.settings, rollout.experiment.candidate
    route = read_route(steps.engine, rollout.key)
    record: dict[str, Any] = {"route_revision": route.revision, "config": rollout.config}
    free = route.stable == rollout.experiment.stable and route.candidate is None and not route.pinned
    if not free and not holds(route, _route_at(rollout, config.share(0))):
        return _fail(steps, rollout, f"the route was changed by {route.updated_by} before the start", record)
    if config.share(0) > route.max_share:
        return _fail(steps, rollout, f"max_share {route.max_share:g} forbids the first stage", record)
    status, said = steps.servables.status(candidate)
    if status == "absent":
        steps.want(candidate)
    late = (steps.clock() - rollout.created_at_us) / SECOND_US > config.rollout.start_timeout_s
    if status == "failed" or (status != "ready" and late):
        return _fail(steps, rollout, f"{candidate} did not become servable: {said or status}", record)
    if status != "ready":
        return rollout
    broken = steps.routers.smoke(route, candidate)
    if broken is not None:
        failures = int(rollout.progress.get("smoke_failures", 0)) + 1
        if failures >= config.rollout.smoke_attempts:
            return _fail(steps, rollout, f"the smoke test failed: {broken}", record)
        log.warning("smoke test %d of %s failed: %s", failures, candidate, broken)
        return steps.remember(rollout, smoke_failures=failures)
    reason = "the candidate is servable"
    if config.gates_override:
        reason += f"; its gates were overridden: {config.gates_override}"
    decision = Decision("start", "started", reason, "running", 0, config.share(0))
    return _record_and_apply(steps, rollout, decision, record, rollout.progress["started_by"])


def _fail(steps: Steps, rollout: Rollout, reason: str, record: dict[str, Any]) -> Rollout:
    decision = Decision("fail", "failed", reason, "failed", rollout.stage, 0.0, ends_as="keep")
    return _record_and_apply(steps, rollout, decision, record, WRITER)


def _record_and_apply(
    steps: Steps, rollout: Rollout, decision: Decision, record: dict[str, Any], actor: str
) -> Rollout:
    has_effects = decision.outcome in ("start", "advance", "unfreeze", "promote", "rollback", "fail")
    rollout = steps.record(rollout, decision, evidence=record, actor=actor, pending=has_effects)
    log.info("rollout %s: %s (%s)", rollout.rollout_id, decision.outcome, decision.reason)
    return _apply_until_settled(steps, rollout) if has_effects else rollout


def _apply_until_settled(steps: Steps, rollout: Rollout) -> Rollout:
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
        done = _apply_share(steps, rollout, decision, pending["route_revision"])
    elif decision.outcome == "promote":
        done = _apply_promotion(steps, rollout, decision, number, actor, pending["route_revision"])
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


def _apply_share(steps: Steps, rollout: Rollout, decision: Decision, recorded: int | None) -> bool:
    change = _route_at(rollout, decision.share)
    if decision.outcome == "unfreeze":
        change, recorded = change | {"pinned": False}, None
    return steps.set_route(rollout, change, decision.reason, recorded)


def _apply_promotion(
    steps: Steps, rollout: Rollout, decision: Decision, number: int, actor: str, recorded: int | None
) -> bool:
    candidate = rollout.experiment.candidate
    if not steps.set_route(rollout, _route_promoted(rollout), decision.reason, recorded):
        return False
    steps.set_champion(rollout, candidate, actor, decision.reason)
    steps.note_decision(rollout, number)
    details = {"rollout_id": rollout.rollout_id, "previous": rollout.experiment.stable}
    steps.announce(
        rollout,
        number,
        {"version": candidate, "change": "alias", "alias": "champion", "details": details},
    )
    steps.end_experiment(rollout, "promote")
    return True


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
    if decision.details.get("restores"):
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
    experiment = rollout.experiment
    for _ in range(ATTEMPTS):
        route = read_route(steps.engine, rollout.key)
        change: dict[str, Any] = {"candidate": None, "share": 0.0, "experiment_id": None}
        if route.stable == experiment.candidate:
            change["stable"] = experiment.stable
        elif route.candidate != experiment.candidate:
            return
        if steps.set_route(rollout, change, reason, None):
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
    record = {"route_revision": route.revision}
    return steps.record(rollout, decision, evidence=record, actor=WRITER, pending=False)


# What people do


def start(
    steps: Steps,
    settings: Settings,
    key: RouteKey,
    candidate: str,
    *,
    actor: str,
    override_reason: str | None = None,
    layer: str | None = None,
) -> Rollout:
    """Put a version in line for its first users; a controller takes it from there.

    Raises:
        ConflictError: it needs retraining, it has not passed its gates (and no reason to override is given), or another
            experiment runs on the route, or the route is pinned.
        InputError: the version is stable already, or the layer has no proper name.
        NotFoundError: no such version or route.
    """
    version = steps.versions.get(candidate)
    route = read_route(steps.engine, key)
    _check_start(version, route, override_reason)
    config = RolloutConfig.of(settings, override_reason)
    share, at_us = config.share(0), steps.clock()
    with write(steps.engine).begin() as connection:
        experiment = create_experiment(
            connection,
            key,
            stable=route.stable,
            candidate=version.id,
            shares={version.id: share, route.stable: 1 - share},
            find_version=steps.versions.get,
            config={"mode": "rollout", "primary": settings.experiment.primary, "started_by": actor},
            layer=layer,
            workspace=settings.workspace,
        )
        rollout = Rollout(
            rollout_id=f"ro-{uuid.uuid4().hex[:16]}",
            experiment=experiment,
            state="pending",
            stage=0,
            stage_started_us=at_us,
            holding_since_us=None,
            approved_stage=None,
            decisions=0,
            pending_decision=None,
            progress={"started_by": actor},
            config=config.model_dump(mode="json"),
            reason="waits until the candidate is servable",
            revision=1,
            created_at_us=at_us,
            updated_at_us=at_us,
        )
        insert_rollout(connection, rollout)
    return rollout


def _check_start(version: Any, route: Route, override_reason: str | None) -> None:
    if NEEDS_RETRAINING_TAG in version.tags:
        raise ConflictError(f"{version.id} needs retraining: {RETRAIN}")
    gates = version.tags.get("rayloop.gates", "not_run")
    if gates != "passed" and not override_reason:
        raise ConflictError(
            f"{version.id} has gates {gates}; run `rayloop evaluate {version.id} --against champion`, "
            "or give --override-gates --reason"
        )
    if route.pinned:
        raise ConflictError(f"route {route.key} is pinned to stable; unpin it first")
    if route.stable == version.id:
        raise InputError("version", version.id, "is already stable on this route", "name another version")
    if route.candidate is not None:
        raise ConflictError(f"route {route.key} has the candidate {route.candidate}; take it off first")


def approve(steps: Steps, rollout_id: str, actor: str) -> Rollout:
    """Let the rollout leave its stage as soon as (and only if) the checks hold."""

    def decide_now(rollout: Rollout) -> Decision:
        _require(rollout, LIVE, "approve")
        return _as_it_is(rollout, "approve", "approved", f"approved by {actor}", approved_stage=rollout.stage + 1)

    return _command(steps, rollout_id, decide_now, actor)


def freeze(steps: Steps, rollout_id: str, actor: str, reason: str | None = None) -> Rollout:
    """Stop the rollout where it is. Guardrails still roll back."""

    def decide_now(rollout: Rollout) -> Decision:
        _require(rollout, LIVE, "freeze")
        why = f"frozen by {actor}" + (f": {reason}" if reason else "")
        return replace(_as_it_is(rollout, "freeze", "frozen", why), to_state="holding", frozen_by=actor)

    return _command(steps, rollout_id, decide_now, actor)


def unfreeze(steps: Steps, rollout_id: str, actor: str) -> Rollout:
    """Go on after a freeze or after somebody changed the route: the stage's share is written again."""

    def decide_now(rollout: Rollout) -> Decision:
        _require(rollout, LIVE, "unfreeze")
        decision = _as_it_is(rollout, "unfreeze", "unfrozen", f"unfrozen by {actor}")
        return replace(decision, to_state="running", frozen_by=None)

    return _command(steps, rollout_id, decide_now, actor)


def roll_back(steps: Steps, rollout_id: str, actor: str, reason: str) -> Rollout:
    """Send everybody to stable, now. After a promotion, within its window, the old champion returns."""

    def decide_now(rollout: Rollout) -> Decision:
        restores = rollout.state in ("promoting", "promoted")
        _require(rollout, (*LIVE, "pending", "promoting", "promoted", "rolling_back"), "rollback")
        age_s = (steps.clock() - rollout.stage_started_us) / SECOND_US
        if rollout.state == "promoted" and age_s > rollout.settings.rollout.restore_window_s:
            raise ConflictError(
                f"{rollout.rollout_id} was promoted {age_s:.0f} s ago; start a rollout of the old version"
            )
        decision = _as_it_is(rollout, "rollback", "by_hand", f"rolled back by {actor}: {reason}")
        details = {"restores": restores}
        return replace(decision, to_state="rolling_back", share=0.0, ends_as="keep", details=details)

    return _command(steps, rollout_id, decide_now, actor)


def _as_it_is(rollout: Rollout, outcome: Any, code: str, reason: str, **values: Any) -> Decision:
    """A decision that leaves state, stage and share as they are."""
    share = rollout.settings.share(rollout.stage)
    return Decision(outcome, code, reason, rollout.state, rollout.stage, share, **values)


def _require(rollout: Rollout, states: tuple[str, ...], command: str) -> None:
    if rollout.state not in states:
        raise ConflictError(f"{rollout.rollout_id} is {rollout.state}; `rollout {command}` needs {' or '.join(states)}")


def _command(steps: Steps, rollout_id: str, decide_now: Callable[[Rollout], Decision], actor: str) -> Rollout:
    """Record and apply a person's decision, trying again when the controller was quicker.

    What was decided before is finished first, so that it is not forgotten half done; only a rollback goes ahead
    of it, for it undoes whatever stands.
    """
    for attempt in range(ATTEMPTS):
        rollout = get_rollout(steps.engine, rollout_id)
        decision = decide_now(rollout)
        if rollout.pending_decision is not None and decision.outcome != "rollback":
            rollout = _apply_until_settled(steps, rollout)
            if rollout.pending_decision is not None:
                raise ConflictError(f"{rollout_id} is still applying its last decision; try again")
            decision = decide_now(rollout)
        route = read_route(steps.engine, rollout.key)
        record = {"command": decision.outcome, "route_revision": route.revision}
        try:
            return _record_and_apply(steps, rollout, decision, record, actor)
        except ConflictError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")
