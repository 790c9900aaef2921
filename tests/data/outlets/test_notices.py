"""Which events people hear of."""

from typing import Any

import pytest

from data.events import BODIES, Event, RecordedEvent, parse_body
from data.outlets.notices import DECISIONS, WORDS, notice

DECISION = {
    "rollout_id": "r1", "experiment_id": "x1", "number": 3, "outcome": "rollback", "reason": "error rate is worse",
    "from_state": "running", "to_state": "rolling_back", "from_stage": 1, "to_stage": 1,
    "share_before": 0.25, "share_after": 0.0,
}  # fmt: skip
EVALUATED = {"version": "triage/3", "change": "evaluated", "details": {"gates": "failed", "against": "triage/2"}}
FAILED = {"job_id": "dpo-1", "job": "dpo", "state": "failed", "reason": "loss is nan", "cause": "HealthGateError"}


def recorded(kind: str, body: dict[str, Any], *, erased: bool = False) -> RecordedEvent:
    event = Event(kind, "acme", "main", parse_body(kind, body), event_id="e1", agent="triage")
    return RecordedEvent(7, event, 1, b"", erased)


@pytest.mark.parametrize(
    ("kind", "body", "severity", "title"),
    [
        ("rollout.decision", DECISION, "page", "triage: rollout r1 is rolled back"),
        ("rollout.decision", DECISION | {"outcome": "promote"}, "success", "triage: rollout r1 is promoted"),
        ("rollout.decision", DECISION | {"outcome": "hold"}, "ticket", "triage: rollout r1 holds"),
        ("dataset.ready", {"dataset_id": "d1", "dataset_hash": "h", "path": "p"}, "success", "triage: d1 is ready"),
        ("model.updated", EVALUATED, "ticket", "triage/3 failed its gates"),
        ("model.updated", {"version": "t/3", "change": "alias", "alias": "champion"}, "success", "t/3 is now champion"),
        (
            "model.updated",
            {"version": "t/3", "change": "alias_removed", "alias": "challenger"},
            "ticket",
            "t/3 is no longer challenger",
        ),
        ("job.ended", FAILED, "ticket", "triage: a health gate stopped dpo dpo-1"),
        ("job.ended", {"job_id": "j", "job": "sft", "state": "completed"}, "success", "triage: sft j is done"),
        ("operator.alert", {"name": "drift", "source": "triage/3", "reason": "agree on 3 of 40"}, "ticket",
         "triage/3: grader and reward model have drifted apart"),
        ("operator.alert", {"name": "interactions_lost", "source": "h:1", "reason": "9 found the queue full"}, "page",
         "h:1: interactions were lost"),
        ("config.rejected", {"source": "config", "reason": "share > 1"}, "ticket",
         "a deployment config was rejected (config)"),
    ],
)  # fmt: skip
def test_event_becomes_a_notice(kind: str, body: dict[str, Any], severity: str, title: str) -> None:
    said = notice(recorded(kind, body))
    assert said is not None
    assert (said.severity, said.title, said.notice_id) == (severity, title, "acme/e1")
    assert (said.facts["kind"], said.facts["seq"]) == (kind, 7)


def test_reason_and_shares_of_a_decision_are_in_the_text() -> None:
    said = notice(recorded("rollout.decision", DECISION))
    assert said is not None
    assert said.text == "error rate is worse\nshare 25% -> 0%, by controller"


def test_quiet_events_are_not_told() -> None:
    assert notice(recorded("model.updated", {"version": "t/3", "change": "servable"})) is None
    assert notice(recorded("outcome", {"name": "solved", "value": 1.0})) is None
    assert notice(recorded("rollout.decision", DECISION, erased=True)) is None


def test_every_alert_has_words_and_is_told_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.settings import load_settings
    from data import alerts
    from data.events import OperatorAlert
    from data.outlets.notices import ALERTS

    assert set(ALERTS) == set(OperatorAlert.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
    hour_us, ids = 3_600_000_000, []
    for at_us in (10 * hour_us, 11 * hour_us - 1, 11 * hour_us):
        monkeypatch.setattr(alerts, "now_us", lambda at_us=at_us: at_us)
        ids.append(alerts.alert(load_settings()[0], "spool", "r").event_id)
    assert ids[0] == ids[1] != ids[2]


def test_words_exist_for_every_outcome_and_only_for_known_kinds() -> None:
    from serve.rollout.state import Outcome

    assert set(DECISIONS) == set(Outcome.__args__)  # type: ignore[attr-defined]
    assert set(WORDS) <= set(BODIES)
