"""The rollout controller: a reconciler that may die anywhere and be replaced by anyone.

One tick of one rollout: finish what was decided earlier; else read state and evidence, decide, record the
decision in the log, apply it, read back what is served, settle. The decision is written first, so a
successor never decides again what has been decided, it only applies it again; every step may be done
twice. People's commands go through the same steps, so they work at once and without a controller.
"""

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US
from cluster.database import write
from cluster.errors import RayloopError
from cluster.lease import acquire_lease, release_lease
from cluster.registry import NEEDS_RETRAINING_TAG, RETRAIN
from cluster.settings import Settings
from data.log import EventLog, save_cursor
from serve.experiments.evidence import Evidence
from serve.experiments.exposures import AFTER
from serve.experiments.projection import Projection
from serve.experiments.readings import read_evidence
from serve.rollout.apply import apply_until_settled, record_and_apply
from serve.rollout.bandits import tick_bandits
from serve.rollout.commands import roll_back
from serve.rollout.decide import decide
from serve.rollout.placement import holds, others_share, route_at, standing, strangers
from serve.rollout.state import LIVE, Decision
from serve.rollout.steps import WRITER, Steps
from serve.rollout.store import Rollout, get_rollout, live_rollouts, promoted_rollouts
from serve.routes import Route, read_route

log = logging.getLogger(__name__)

LEASE = "rollout-controller"
LOOKED = "rollouts"
"""Cursor that holds when every rollout was last looked at, by the clock."""
UNREADABLE = (sa.exc.SQLAlchemyError, ValueError, ArithmeticError, LookupError)
"""What statistics that cannot be had or make no sense end in: a hold."""


class Controller:
    """Drives every live rollout of one database. Construct one a process; `tick` is not thread-safe."""

    def __init__(self, steps: Steps, settings: Settings) -> None:
        self.steps = steps
        self.settings = settings
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.projection = Projection(steps.engine, settings)

    def tick(self) -> bool:
        """Count the log and look at every live rollout; `False` when another controller is in charge.

        What is decided already is applied before anything is counted, and without being in charge: two may do it, and
        a dead controller's lease need not run out first. A rollout that fails is logged, says so in its status, and is
        left as it is (which is a hold) until the next tick.
        """
        is_leader = self.leads()
        self._apply_recorded()
        if not is_leader:
            return False
        looked_us = EventLog(self.steps.engine).cursor(LOOKED)
        counted = self._count()
        window_us = round(self.settings.rollout.restore_window_s * SECOND_US)
        promoted = promoted_rollouts(self.steps.engine, self.steps.clock() - window_us)
        for rollout in [*live_rollouts(self.steps.engine), *promoted]:
            if not self.leads():
                return False
            self._try(rollout, lambda own: tick_rollout(self.steps, own, counted=counted, looked_us=looked_us))
        with write(self.steps.engine).begin() as connection:
            save_cursor(connection, LOOKED, self.steps.clock())
        if counted:
            tick_bandits(self.steps, self.settings)
        self.steps.servables.sync(self.steps.clock())
        return True

    def leads(self) -> bool:
        """Take or renew the lease; `False` while another controller has it."""
        rollout = self.settings.rollout
        return acquire_lease(self.steps.engine, LEASE, self.holder, rollout.lease_s, self.steps.clock())

    def close(self) -> None:
        """Let another controller take over at once."""
        release_lease(self.steps.engine, LEASE, self.holder)

    def _apply_recorded(self) -> None:
        for rollout in live_rollouts(self.steps.engine):
            if rollout.pending_decision is not None:
                self._try(rollout, lambda own: apply_until_settled(self.steps, own))

    def _try(self, rollout: Rollout, act: Callable[[Rollout], Rollout]) -> None:
        """One rollout's failure, whatever it is, keeps nobody from looking at the others."""
        failure = None
        try:
            rollout = act(rollout)
        except RayloopError as error:
            failure = str(error)
            log.warning("rollout %s stays as it is: %s", rollout.rollout_id, error)
        except Exception as error:
            failure = repr(error)
            log.exception("rollout %s stays as it is: its tick failed", rollout.rollout_id)
        try:
            self._note(rollout, failure)
        except (RayloopError, sa.exc.SQLAlchemyError) as error:
            log.warning("rollout %s: its failure could not be noted: %s", rollout.rollout_id, error)

    def _note(self, rollout: Rollout, failure: str | None) -> None:
        """Keep why a rollout could not be looked at, until it can be."""
        if rollout.progress.get("failure") != failure:
            self.steps.remember(get_rollout(self.steps.engine, rollout.rollout_id), failure=failure)

    def _count(self) -> bool:
        """Count the log for at most the time between two ticks; the rest is counted with the next."""
        ends = time.monotonic() + self.settings.rollout.tick_s
        try:
            self.projection.catch_up(lambda: time.monotonic() < ends and self.leads())
        except UNREADABLE:
            log.exception("the log could not be counted; rollouts hold")
            return False
        return True


def tick_rollout(steps: Steps, rollout: Rollout, *, counted: bool = True, looked_us: int = 0) -> Rollout:
    """One step of one rollout; returns it as it is afterwards. `looked_us`: when all of them were last looked at."""
    if rollout.pending_decision is not None:
        return apply_until_settled(steps, rollout)
    if rollout.state == "pending":
        return _start_when_ready(steps, rollout)
    route = read_route(steps.engine, rollout.key)
    if rollout.state == "promoted":
        rollout = _release_previous(steps, rollout)
    elif rollout.state not in LIVE:
        return rollout
    state = rollout.as_state(**_seen(rollout, route), unseen_since_us=_unseen_since(steps, rollout, looked_us))
    evidence = _evidence(steps.engine, rollout) if counted and state.answered_by is None else None
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
        "route": standing(route, rollout),
    }
    return record_and_apply(steps, rollout, decision, record, WRITER)


def _unseen_since(steps: Steps, rollout: Rollout, looked_us: int) -> int | None:
    """Since when nobody could look at a rollout, where that is longer than it may hold: no database is no success."""
    since_us = max(looked_us, rollout.updated_at_us)
    is_long = looked_us and (steps.clock() - since_us) / SECOND_US > rollout.settings.rollout.hold_limit_s
    return since_us if is_long else None


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
    except UNREADABLE:
        log.exception("evidence of %s could not be read; it holds", rollout.rollout_id)
        return None


def _is_news(rollout: Rollout, decision: Decision) -> bool:
    """True for everything but a hold that says what the last decision said, or that it is early yet."""
    last = rollout.progress.get("last_code")
    known = (last, "waiting", *(() if last == "replaced" else ("watching",)))
    same = decision.to_state == rollout.state and decision.code in known
    return not same or decision.look is not None or decision.outcome not in ("hold", "await_approval")


def _seen(rollout: Rollout, route: Route) -> dict[str, Any]:
    """What the route says to the rollout, by the names of `RolloutState`."""
    experiment = rollout.experiment
    if rollout.state == "promoted":
        return {"answered_by": None if route.stable == experiment.candidate else route.stable}
    replaced = route.stable != experiment.stable and route.updated_by == WRITER
    return {
        "edited_by": None if replaced else _edited_by(rollout, route),
        "superseded_by": route.stable if replaced else None,
        "max_share": route.max_share,
        "others_share": others_share(route, rollout),
    }


def _edited_by(rollout: Rollout, route: Route) -> str | None:
    """Who moved the route away from where the rollout has put it, if anybody did. A lower ceiling does not move it."""
    as_put = route_at(route, rollout, rollout.settings.share(rollout.stage)) | {"pinned": False}
    return None if holds(route, as_put) else route.updated_by


def _start_when_ready(steps: Steps, rollout: Rollout) -> Rollout:
    """Bring the candidate up, try it, and give it its first users."""
    config, candidate = rollout.settings, rollout.experiment.candidate
    route = read_route(steps.engine, rollout.key)
    record: dict[str, Any] = {
        "route_revision": route.revision,
        "route": standing(route, rollout),
        "config": rollout.config,
    }
    free = route.stable == rollout.experiment.stable and not strangers(route, rollout) and not route.pinned
    if not free:
        return _fail(steps, rollout, f"the route was changed by {route.updated_by} before the start", record)
    if config.share(0) + others_share(route, rollout) > route.max_share:
        return _fail(steps, rollout, f"max_share {route.max_share:g} forbids the first stage", record)
    status, said = steps.servables.status(candidate)
    late = (steps.clock() - rollout.created_at_us) / SECOND_US > config.rollout.start_timeout_s
    failure = rollout.progress.get("failure")
    if status == "failed" or (late and (status != "ready" or failure)):
        return _fail(steps, rollout, f"{candidate} did not become servable: {failure or said or status}", record)
    if status != "ready":
        if status == "absent":
            steps.want(candidate)
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
    return record_and_apply(steps, rollout, decision, record, rollout.progress["started_by"])


def _fail(steps: Steps, rollout: Rollout, reason: str, record: dict[str, Any]) -> Rollout:
    decision = Decision("fail", "failed", reason, "failed", rollout.stage, 0.0, ends_as="keep")
    return record_and_apply(steps, rollout, decision, record, WRITER)
