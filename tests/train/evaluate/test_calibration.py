"""Grader and reward model against people: agreement, how sure they are, and the temperature that mends it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.settings import Settings
from data.events import Event
from data.grading import AtHand, load_grader, make_grader
from data.labelling.requests import (
    AnswerToLabel,
    JudgedPair,
    LabelRequest,
    item_id,
    judged_pairs,
    request_event_id,
    request_labels,
)
from data.log import EventLog
from tests.data.labelling.test_requests import label
from tests.data.traffic import interaction
from tests.train.evaluate.fakes import prompt
from train.evaluate.calibration import calibration, refitted
from train.evaluate.evidence import Evidence
from train.evaluate.record import keep_grader

DIGEST = "a" * 64


class Sure:
    """A reward model that is four nats surer of `good` than of `bad`."""

    adapter_sha256 = DIGEST

    def scores(self, conversations: Any) -> list[float]:
        return [4.0 * (chat[-1]["content"] == "good") for chat in conversations]


def judged(agree: int, of: int) -> list[JudgedPair]:
    """What people said: so many of the pairs as the reward model would have it."""
    order = [n < agree for n in range(of)]
    random.Random(0).shuffle(order)
    pairs = [("good", "bad") if same else ("bad", "good") for same in order]
    return [JudgedPair(f"p{n}", prompt(f"alert {n}").messages, *pair, None) for n, pair in enumerate(pairs)]


def evidence_of(make: Callable[..., Evidence], pairs: Sequence[JudgedPair], temperature: float = 1.0) -> Evidence:
    config = {"type": "reward_model", "adapter_sha256": DIGEST, "temperature": temperature, "center": 2.0}
    grader = make_grader(config, at_hand=AtHand(scorer=Sure()))
    return replace(make(str, str), grader=grader, judged=list(pairs))


def test_a_grader_that_people_agree_with_as_often_as_it_is_sure_raises_no_alert(
    make_evidence: Callable[..., Evidence],
) -> None:
    evidence = evidence_of(make_evidence, judged(59, 60))  # sigmoid(4) is .982
    (gate,) = calibration(evidence)
    assert gate.status == "passed" and gate.metrics["alert"] == 0
    assert gate.value == pytest.approx(59 / 60) and gate.metrics["calibration_error"] < 0.01
    assert refitted(evidence, [gate]) == []


def test_a_grader_that_is_too_sure_gets_the_temperature_that_fits(
    make_evidence: Callable[..., Evidence], settings: Settings
) -> None:
    evidence = evidence_of(make_evidence, judged(45, 60))
    (gate,) = calibration(evidence)
    assert gate.status == "failed" and gate.metrics["alert"] == 1
    assert gate.metrics["calibration_error"] == pytest.approx(0.982 - 0.75, abs=1e-3)
    (grader,) = refitted(evidence, [gate])
    assert grader.config.temperature == pytest.approx(4 / 1.0986, abs=1e-2)  # sigmoid(4 / T) is .75 at T = 4 / ln 3
    assert grader.version != evidence.grader.version
    (again,) = calibration(replace(evidence, grader=grader))
    assert again.status == "passed" and again.metrics["calibration_error"] < 0.01
    kept = keep_grader(settings, grader)
    assert kept.stem == grader.version
    with pytest.raises(Exception, match="has no reward model to ask"):
        load_grader(kept)


def test_people_who_prefer_the_other_answers_raise_the_alert(make_evidence: Callable[..., Evidence]) -> None:
    (gate,) = calibration(evidence_of(make_evidence, judged(5, 60)))
    assert gate.status == "failed" and gate.metrics["alert"] == 1 and gate.value == pytest.approx(5 / 60)
    few = calibration(evidence_of(make_evidence, judged(10, 10)))
    assert few[0].status == "no_data"


def test_a_grader_that_needs_recorded_truth_has_no_opinion_on_them(make_evidence: Callable[..., Evidence]) -> None:
    made = replace(make_evidence(str, str), judged=judged(60, 60))
    both = replace(made, reward_model=evidence_of(make_evidence, []).grader)
    assert [(gate.suite, gate.status) for gate in calibration(both)] == [
        ("calibration", "no_data"),
        ("calibration[reward_model]", "passed"),
    ]


def test_judged_pairs_are_recent_ones_of_the_agent_with_a_winner(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    answers = tuple(AnswerToLabel("t/1", {"role": "assistant", "content": text}) for text in ("left", "right"))
    asked = LabelRequest("", "default", "default", "evaluation", answers, prompt("q").messages, agent="triage")
    names = ("won", "lost", "tied", "unjudged", "other")
    request_labels(log, [replace(asked, request_id=n, agent="mail" if n == "other" else "triage") for n in names])
    for name, preferred in (("won", 0), ("lost", 1), ("tied", None), ("other", 0)):
        item = item_id("default", request_event_id(name))
        log.append([label(item, place, 1, preferred, "rita") for place in (0, 1)])
    found = judged_pairs(log, "default", agent="triage", since_us=0)
    assert sorted((pair.preferred, pair.other) for pair in found) == [("left", "right"), ("right", "left")]
    assert found[0].messages == prompt("q").messages
    assert judged_pairs(log, "default", agent="triage", since_us=now_us() + 1) == []


def test_judged_pairs_of_interactions_have_the_texts_that_the_log_has(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    log.append([interaction(1, "q", "left", user="ada"), interaction(2, "q", "right", user="ada")])
    asked = LabelRequest("", "default", "default", "disagreement", (), agent="triage")
    known = (AnswerToLabel("t/1", interaction_id="i1"), AnswerToLabel("t/2", interaction_id="i2"))
    gone = (AnswerToLabel("t/1", interaction_id="i1"), AnswerToLabel("t/2", interaction_id="i9"))
    request_labels(
        log, [replace(asked, request_id="known", answers=known), replace(asked, request_id="g", answers=gone)]
    )
    for name, answers in (("known", known), ("g", gone)):
        item = item_id("default", request_event_id(name))
        for answer in answers:
            body = {"reviewer": "rita", "preferred": "i2" if name == "known" else "i1", "item_id": item}
            log.append([Event("label", "default", "default", body, interaction_id=answer.interaction_id)])
    (pair,) = judged_pairs(log, "default", agent="triage", since_us=0)
    assert (pair.preferred, pair.other) == ("right", "left")
    assert pair.messages[-1] == {"role": "user", "content": "q"}
