"""People compare held-out answers without knowing whose they are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.database import connect
from cluster.settings import Settings
from data.labelling.requests import item_id, request_event_id
from data.log import EventLog
from tests.data.labelling.test_requests import label
from tests.train.evaluate.fakes import answer_json, make_truths
from train.evaluate.evidence import Evidence, Question
from train.evaluate.human import ask_people, human, questions_of


@pytest.fixture
def asking(make_evidence: Callable[..., Evidence]) -> Callable[..., Evidence]:
    """Evidence of two versions that answer differently."""

    def make(prompts: int = 30, **more: Any) -> Evidence:
        right, wrong = (lambda text: answer_json("benign")), (lambda text: answer_json("malicious"))
        return make_evidence(right, wrong, make_truths(prompts), **more)

    return make


def judge(settings: Settings, question: Question, preferred: int | None, reviewer: str = "rita") -> None:
    """A reviewer compares the two answers."""
    item = item_id(settings.tenant, request_event_id(question.request.request_id))
    said = [
        label(item, place, 1, preferred, reviewer, scores={"success": float(place == preferred)}) for place in (0, 1)
    ]
    engine = connect(settings)
    EventLog(engine).append(said)
    engine.dispose()


def requested(settings: Settings) -> list[dict[str, Any]]:
    engine = connect(settings)
    found = [r.event.body for r in EventLog(engine).read(kinds=["label.requested"], limit=500)]
    engine.dispose()
    return found


def test_a_hundred_differing_answers_go_to_the_queue_blind(
    settings: Settings, asking: Callable[..., Evidence], make_evidence: Callable[..., Evidence]
) -> None:
    evidence = asking(130)
    for _ in range(2):  # asking again adds nothing
        gate = human(ask_people(settings, "triage", evidence))
    assert (gate.status, gate.value) == ("waiting", None) and "100 answers wait" in gate.detail
    sent = requested(settings)
    assert len(sent) == 100 and all(body["reason"] == "evaluation" for body in sent)
    first = [body["answers"][0]["version"] for body in sent]
    assert 20 < first.count("t/2") < 80  # which version stands first tells nothing
    contents = {(a["version"], a["message"]["content"]) for body in sent for a in body["answers"]}
    assert contents == {("t/2", answer_json("benign")), ("t/1", answer_json("malicious"))}
    same = make_evidence(lambda text: "yes", lambda text: "yes", make_truths(10))
    assert questions_of(same, "default", "default", "triage") == []
    assert human(ask_people(settings, "triage", same)).status == "no_data"


def test_what_people_prefer_is_read_when_it_comes_back(settings: Settings, asking: Callable[..., Evidence]) -> None:
    evidence = asking(30)
    asked = ask_people(settings, "triage", evidence).asked
    assert asked is not None and len(asked.questions) == 30
    for number, question in enumerate(asked.questions[:24]):
        judge(settings, question, question.place if number < 18 else 1 - question.place if number < 22 else None)
    gate = human(ask_people(settings, "triage", evidence))
    assert gate.status == "waiting" and gate.detail == "18 preferred, 2 undecided, 4 not; 6 wait"
    assert gate.value == pytest.approx((18 + 1) / 24)
    assert gate.metrics["judged"] == 24 and gate.metrics["candidate_success"] == pytest.approx(18 / 24)
    for question in asked.questions[24:]:
        judge(settings, question, question.place)
    done = human(ask_people(settings, "triage", evidence))
    assert done.status == "passed" and done.interval is not None and done.interval[0] > 0.5


def test_several_people_decide_by_majority(settings: Settings, asking: Callable[..., Evidence]) -> None:
    evidence = asking(1)
    asked = ask_people(settings, "triage", evidence).asked
    assert asked is not None
    (question,) = asked.questions
    for reviewer, preferred in (("ann", question.place), ("ben", question.place), ("cy", 1 - question.place)):
        judge(settings, question, preferred, reviewer)
    assert human(ask_people(settings, "triage", evidence)).detail == "1 preferred, 0 undecided, 0 not"


def test_not_applicable_asks_nobody(settings: Settings, asking: Callable[..., Evidence]) -> None:
    evidence = asking(30, not_applicable={"human": "nobody to ask"})
    assert ask_people(settings, "triage", evidence).asked is None and requested(settings) == []


def test_pseudonyms_of_sessions_are_no_people(asking: Callable[..., Evidence]) -> None:
    evidence = asking(2)
    truths = [replace(evidence.truths[0], user_id="session:s1"), evidence.truths[1]]
    found = {q.truth.user_id: q.request.user_id for q in questions_of(replace(evidence, truths=truths), "t", "w", "a")}
    assert found == {"session:s1": None, truths[1].user_id: truths[1].user_id}
