"""Rebuilds every recorded decision from the log, byte for byte.

A `rollout.decision` event keeps the state, the evidence (aggregates only, so it survives an erasure), the
configuration and the time it was made from. Deciding again must give the same bytes; what the event says beside
must follow from the decision; and each decision must start where the one before it ended.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Engine

from cluster.tables import events
from data.events import RecordedEvent
from data.log import EventLog
from serve.experiments.evidence import Evidence
from serve.rollout.decide import decide
from serve.rollout.state import SETTLED, Decision, RolloutConfig, RolloutState


@dataclass(frozen=True, slots=True)
class DecisionFault:
    """One thing about one decision that does not follow from the log."""

    seq: int
    rollout_id: str
    number: int
    what: str


@dataclass(slots=True)
class ReplayReport:
    """What replaying the decisions found."""

    decisions: int = 0
    rebuilt: int = 0
    """Decided again from their evidence, with the same bytes; the others are people's commands."""
    erased_behind: dict[str, int] = field(default_factory=dict)
    """Rollout -> interactions of its agent, recorded before its last decision, that were erased since."""
    faults: list[DecisionFault] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def replay(record: Mapping[str, Any]) -> Decision:
    """The decision that the evidence kept in a `rollout.decision` event leads to."""
    evidence = record["evidence"]
    return decide(
        RolloutState.from_json(record["state"]),
        Evidence.from_json(evidence) if evidence else None,
        RolloutConfig.model_validate(record["config"]),
        record["now_us"],
    )


def canonical(decision: Mapping[str, Any]) -> bytes:
    """A decision as bytes: JSON with sorted keys."""
    return orjson.dumps(decision, option=orjson.OPT_SORT_KEYS)


def verify_decisions(engine: Engine) -> ReplayReport:
    """Replay every decision of the log, in order."""
    report = ReplayReport()
    last: dict[str, Mapping[str, Any]] = {}
    for recorded in EventLog(engine).scan(kinds=["rollout.decision"]):
        report.decisions += 1
        body = recorded.event.body
        if recorded.erased or not body:
            report.faults.append(DecisionFault(recorded.seq, "?", 0, "its body is gone"))
            continue
        rollout_id, number = str(body.get("rollout_id")), int(body.get("number", 0))
        problems = [*_continuity(last.get(rollout_id), body), *_consistency(body)]
        report.faults += [DecisionFault(recorded.seq, rollout_id, number, what) for what in problems]
        report.rebuilt += "state" in body["evidence"] and not problems
        report.erased_behind[rollout_id] = _erased_before(engine, recorded)
        last[rollout_id] = body
    return report


def _consistency(body: Mapping[str, Any]) -> Iterator[str]:
    """Whether the decision follows from its evidence, and the event from the decision."""
    record = body["evidence"]
    said = record.get("decision")
    if said is None:
        yield "it keeps no decision"
        return
    if "state" in record:
        try:
            rebuilt = canonical(replay(record).as_json())
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            yield f"it cannot be decided again: {type(error).__name__}: {error}"
            return
        if rebuilt != canonical(said):
            yield f"deciding again gives {_shown(orjson.loads(rebuilt))}, not {_shown(said)}"
    beside = {"outcome": "outcome", "reason": "reason", "to_state": "to_state", "to_stage": "to_stage"}
    for name, own in (beside | {"share_after": "share"}).items():
        if body[name] != said.get(own):
            yield f"{name} is {body[name]!r}, its decision says {said.get(own)!r}"
    if "state" in record and (record["state"]["state"], record["state"]["stage"]) != (
        body["from_state"],
        body["from_stage"],
    ):
        yield "it was made from another state than it says"


def _continuity(before: Mapping[str, Any] | None, body: Mapping[str, Any]) -> Iterator[str]:
    """Whether it is the next one, and starts where the one before ended."""
    number = int(body["number"])
    expected = 1 if before is None else int(before["number"]) + 1
    if number != expected:
        yield f"decision {expected} is missing before it" if number > expected else "it is out of order"
        return
    if before is None:
        return
    ended = {before["to_state"], SETTLED.get(before["to_state"], before["to_state"])}
    undone = {before["from_state"]}  # a rollback or a change of the route may overtake a decision being applied
    if body["from_state"] not in ended | undone:
        yield f"it starts from {body['from_state']}, the one before ended in {before['to_state']}"


def _erased_before(engine: Engine, recorded: RecordedEvent) -> int:
    """Interactions of the agent before this decision whose bodies are gone by erasure."""
    event, e = recorded.event, events.c
    query = sa.select(sa.func.count()).where(
        e.kind == "interaction",
        e.erased,
        e.tenant == event.tenant,
        e.agent == event.agent,
        e.seq < recorded.seq,
    )
    with engine.connect() as connection:
        return connection.execute(query).scalar() or 0


def _shown(decision: Mapping[str, Any]) -> str:
    return f"{decision.get('outcome')} ({decision.get('code')}: {decision.get('reason')})"
