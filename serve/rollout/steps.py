"""The effects of decisions, one method each; every one may be done twice without harm.

The controller does them in order, and may die between any two. A test kills it there; whoever comes
next reads the pending decision and does them all again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.errors import ConflictError
from data.events import Event, parse_body
from data.log import EventLog
from serve.applications.driver import Status
from serve.experiments.store import Outcome as ExperimentOutcome
from serve.experiments.store import end_experiment
from serve.rollout.placement import holds, standing
from serve.rollout.report import decision_body, summary
from serve.rollout.state import SETTLED, Decision
from serve.rollout.store import Rollout, get_rollout, update_rollout
from serve.routes import Route, read_route, read_routes, write_route

log = logging.getLogger(__name__)

WRITER = "controller"
ROLLED_BACK_TAG = "rayloop.rolled_back"
DECISION_TAG = "rayloop.rollout_decision"


class Versions(Protocol):
    """What of the registry a rollout needs (`cluster.registry.Registry`)."""

    def get(self, ref: str) -> Any:
        """The version; NotFoundError for others."""

    def set_alias(self, model: str, alias: str, version: str, *, actor: str, reason: str) -> None:
        """Point an alias at a version."""

    def tag(self, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""


class Servables(Protocol):
    """Which engines hold which version."""

    def want(self, version: str) -> None:
        """Ask every replica to load it."""

    def unwant(self, version: str) -> None:
        """Let it be unloaded."""

    def status(self, version: str) -> tuple[Status, str]:
        """Whether every live replica holds it, and what they say."""

    def sync(self, now_us: int) -> None:
        """Bring engines up and down as the wanted versions need; what fails is tried again at the next call."""


class Routers(Protocol):
    """The live routers."""

    def smoke(self, route: Route, version: str) -> str | None:
        """Why a candidate fails its smoke test; `None` when it answers."""

    def shows(self, route: Route) -> bool:
        """True once the routers serve this revision of a route."""


@dataclass
class Steps:
    """The real effects, on one database, registry and engine."""

    engine: Engine
    versions: Versions
    servables: Servables
    routers: Routers
    clock: Callable[[], int] = now_us

    def record(
        self, rollout: Rollout, decision: Decision, *, evidence: dict[str, Any], actor: str, pending: bool
    ) -> Rollout:
        """Write the decision into the log and into the rollout, in one transaction.

        Without effects (`pending` false) the rollout is then in its new state already.

        Raises:
            ConflictError: somebody else decided first.
        """
        at_us, number = self.clock(), rollout.decisions + 1
        values: dict[str, Any] = {"decisions": number, "progress": rollout.progress_after(decision)}
        if decision.approved_stage is not None:
            values["approved_stage"] = decision.approved_stage
        if pending:
            values["pending_decision"] = {
                "decision": decision.as_json(),
                "number": number,
                "actor": actor,
                "route": evidence.get("route"),
                "at_us": at_us,
            }
            values |= {"state": decision.to_state} if decision.outcome in ("promote", "rollback") else {}
            values["reason"] = decision.reason
        else:
            values |= self._settled(rollout, decision, at_us) | {"pending_decision": None}
        with write(self.engine).begin() as connection:
            update_rollout(connection, rollout, at_us, values)
            event = _decision_event(rollout, decision, number, evidence, actor, at_us)
            EventLog(self.engine).append_in(connection, [event])
        return get_rollout(self.engine, rollout.rollout_id)

    def remember(self, rollout: Rollout, **values: Any) -> Rollout:
        """Note something between decisions."""
        with write(self.engine).begin() as connection:
            changed = {"progress": rollout.progress | values}
            update_rollout(connection, rollout, self.clock(), changed)
        return get_rollout(self.engine, rollout.rollout_id)

    def set_route(
        self,
        rollout: Rollout,
        change_of: Callable[[Route], dict[str, Any]],
        reason: str,
        seen: dict[str, Any] | None,
    ) -> bool:
        """Bring the route to what was decided; `False` when somebody has changed it since the decision.

        `seen` is the route's `standing` at the decision, `None` where theirs need not be respected. A write that lost
        a race is made again after another reading, for the winner may be another controller that applies the same.
        """
        refused = -1
        while True:
            route = read_route(self.engine, rollout.key)
            change = change_of(route)
            if holds(route, change):
                return True
            if route.revision == refused or (seen is not None and standing(route, rollout) != seen):
                return False
            refused = route.revision
            try:
                write_route(
                    self.engine,
                    rollout.key,
                    change,
                    expected_revision=route.revision,
                    writer=WRITER,
                    reason=reason,
                    workspace=rollout.experiment.workspace,
                )
            except ConflictError as error:
                log.warning("route %s refused %s: %s", rollout.key, change, error)
            else:
                return True

    def set_champion(self, rollout: Rollout, version: str, actor: str, reason: str) -> None:
        """Move the alias `champion`, if nobody has decided otherwise meanwhile.

        Raises:
            ConflictError: somebody has; their decision is applied instead.
        """
        if get_rollout(self.engine, rollout.rollout_id).revision != rollout.revision:
            raise ConflictError(f"rollout {rollout.rollout_id} was decided anew")
        self.versions.set_alias(rollout.experiment.agent, "champion", version, actor=actor, reason=reason)

    def mark_rolled_back(self, rollout: Rollout, reason: str) -> None:
        """Tag the candidate with why it came back."""
        self.versions.tag(rollout.experiment.candidate, ROLLED_BACK_TAG, reason)

    def note_decision(self, rollout: Rollout, number: int) -> None:
        """Tag the candidate with the decision that ended its rollout, and the numbers behind it."""
        body = decision_body(self.engine, rollout, number)
        if body is not None:
            self.versions.tag(rollout.experiment.candidate, DECISION_TAG, summary(body))

    def announce(self, rollout: Rollout, number: int, body: dict[str, Any]) -> None:
        """Append a `model.updated` event, once for each decision."""
        experiment = rollout.experiment
        event_id = f"rollout:{rollout.rollout_id}:{number}:{body['change']}"
        checked = parse_body("model.updated", body)
        event = Event(
            "model.updated",
            experiment.tenant,
            experiment.workspace,
            checked,
            event_id=event_id,
            occurred_at_us=self.clock(),
            agent=experiment.agent,
        )
        EventLog(self.engine).append([event])

    def end_experiment(self, rollout: Rollout, outcome: ExperimentOutcome) -> None:
        """Record how the experiment ended."""
        with write(self.engine).begin() as connection:
            end_experiment(connection, rollout.experiment.experiment_id, outcome, self.clock())

    def want(self, version: str) -> None:
        """Ask the engines to hold a version."""
        self.servables.want(version)

    def unwant(self, version: str) -> None:
        """Let the engines drop a version, unless a route still names it."""
        used = {named for route in read_routes(self.engine) for named in route.versions}
        if version not in used:
            self.servables.unwant(version)

    def is_shown(self, rollout: Rollout) -> bool:
        """Read back what the routers serve."""
        return self.routers.shows(read_route(self.engine, rollout.key))

    def finish(self, rollout: Rollout, decision: Decision) -> Rollout:
        """The decision is applied and confirmed: settle the rollout in its new state."""
        at_us = self.clock()
        values = {"pending_decision": None} | self._settled(rollout, decision, at_us)
        with write(self.engine).begin() as connection:
            update_rollout(connection, rollout, at_us, values)
        return get_rollout(self.engine, rollout.rollout_id)

    def _settled(self, rollout: Rollout, decision: Decision, at_us: int) -> dict[str, Any]:
        """The row's values once a decision is done."""
        state = SETTLED.get(decision.to_state, decision.to_state)
        restarts = decision.outcome in ("start", "advance", "unfreeze", "promote")
        return {
            "state": state,
            "stage": decision.to_stage,
            "stage_started_us": at_us if restarts else rollout.stage_started_us,
            "holding_since_us": (rollout.holding_since_us or at_us) if state == "holding" else None,
            "reason": decision.reason,
        }


def _decision_event(
    rollout: Rollout, decision: Decision, number: int, evidence: dict[str, Any], actor: str, at_us: int
) -> Event:
    experiment, config = rollout.experiment, rollout.settings
    before = config.share(rollout.stage) if rollout.state != "pending" else 0.0
    body = {
        "rollout_id": rollout.rollout_id,
        "experiment_id": experiment.experiment_id,
        "number": number,
        "outcome": decision.outcome,
        "reason": decision.reason,
        "from_state": rollout.state,
        "to_state": decision.to_state,
        "from_stage": rollout.stage,
        "to_stage": decision.to_stage,
        "share_before": before,
        "share_after": decision.share,
        "evidence": evidence | {"decision": decision.as_json()},
        "actor": actor,
    }
    return Event(
        "rollout.decision",
        experiment.tenant,
        experiment.workspace,
        parse_body("rollout.decision", body),
        event_id=f"rollout:{rollout.rollout_id}:{number}",
        occurred_at_us=at_us,
        agent=experiment.agent,
    )
