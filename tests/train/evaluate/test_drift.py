import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.settings import Settings
from data.grading import AtHand, make_grader
from tests.train.evaluate.fakes import answer_json, make_truths
from train.evaluate.drift import grader_drift
from train.evaluate.evidence import Evidence
from train.evaluate.record import _events


class Taste:
    """A reward model with one taste."""

    adapter_sha256 = "a" * 64

    def __init__(self, likes: str) -> None:
        self.likes = likes

    def scores(self, conversations: Any) -> list[float]:
        return [float(self.likes in chat[-1]["content"]) for chat in conversations]


def evidence_with(make: Callable[..., Evidence], likes: str, prompts: int = 40) -> Evidence:
    """The candidate says what was recorded (benign), the champion does not."""
    made = make(lambda text: answer_json("benign"), lambda text: answer_json("malicious"), make_truths(prompts))
    config = {"type": "reward_model", "adapter_sha256": "a" * 64}
    return replace(made, reward_model=make_grader(config, at_hand=AtHand(scorer=Taste(likes))))


def test_agreement_is_no_alert(make_evidence: Callable[..., Evidence], caplog: pytest.LogCaptureFixture) -> None:
    gate = grader_drift(evidence_with(make_evidence, "benign"))
    assert (gate.status, gate.value, gate.metrics["alert"]) == ("passed", 1.0, 0.0)
    assert not caplog.records


def test_grader_and_reward_model_that_disagree_raise_the_alert(
    make_evidence: Callable[..., Evidence], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        gate = grader_drift(evidence_with(make_evidence, "malicious"))
    assert (gate.status, gate.value, gate.metrics["alert"]) == ("failed", 0.0, 1.0)
    assert len(gate.changed_cases) == 40
    assert "drift:" in caplog.text and "agree on 0 of 40 answers" in caplog.text


def test_drift_is_told_in_the_log(make_evidence: Callable[..., Evidence], settings: Settings) -> None:
    version = SimpleNamespace(id="triage/3", model="triage", adapter_sha256=None, dataset_hash=None)
    for likes, alerts in (("benign", []), ("malicious", ["triage/3"])):
        gate = grader_drift(evidence_with(make_evidence, likes))
        found = SimpleNamespace(gates=[gate], against="triage/2", run_id="r", alias=None, passed=True, dataset_hash="h")
        events = _events(settings, version, found, "passed")  # type: ignore[arg-type]
        told = [event.body for event in events if event.kind == "operator.alert"]
        assert [body["source"] for body in told] == alerts
    assert "agree on 0 of 40" in told[0]["reason"]


def test_too_few_preferences_prove_nothing(make_evidence: Callable[..., Evidence]) -> None:
    assert grader_drift(evidence_with(make_evidence, "owner")).status == "no_data"  # likes every answer
    assert grader_drift(evidence_with(make_evidence, "malicious", prompts=10)).status == "no_data"


def test_without_a_reward_model_it_is_not_applicable(make_evidence: Callable[..., Evidence]) -> None:
    made = make_evidence(lambda text: "a", lambda text: "b", make_truths(30))
    assert grader_drift(made).status == "not_applicable"
