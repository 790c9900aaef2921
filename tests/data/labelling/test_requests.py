"""Requests for people's judgement, and what they said."""

from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.errors import InputError
from data.events import Event, parse_body
from data.labelling.requests import (
    AnswerToLabel,
    LabelRequest,
    answer_name,
    item_id,
    labels_for,
    request_event_id,
    request_labels,
)
from data.log import EventLog

PROMPT = ({"role": "user", "content": "Which verdict?"},)


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def blind(request_id: str = "r1", **changes: Any) -> LabelRequest:
    """Two answers of an evaluation to one prompt."""
    answers = (AnswerToLabel("triage/2", said("escalate")), AnswerToLabel("triage/1", said("close")))
    given: dict[str, Any] = {"reason": "evaluation", "answers": answers, "messages": PROMPT}
    return LabelRequest(request_id, "default", "default", **(given | changes))


def item_of(request_id: str) -> str:
    return item_id("default", request_event_id(request_id))


def label(
    item: str, place: int, at_us: int, preferred: int | None = None, reviewer: str = "rita", **body: Any
) -> Event:
    if preferred is not None:
        body["preferred"] = answer_name(item, preferred)
    body |= {"reviewer": reviewer, "item_id": item, "answer": answer_name(item, place)}
    return Event("label", "default", "default", parse_body("label", body), occurred_at_us=at_us)


def test_asking_twice_is_asking_once(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    request_labels(log, [blind(), blind("r2")])
    request_labels(log, [blind()])
    events = [r.event for r in log.read(kinds=["label.requested"])]
    assert [e.event_id for e in events] == [request_event_id("r1"), request_event_id("r2")]
    assert [a["version"] for a in events[0].body["answers"]] == ["triage/2", "triage/1"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"answers": ()}, "answers"),
        ({"answers": (AnswerToLabel("v/1"),)}, "interaction_id or a message"),
        ({"answers": (AnswerToLabel("v/1", said("x"), "i1"),)}, "not both"),
        ({"messages": ()}, "must hold the prompt"),
        ({"reviewers": 0}, "reviewers"),
        ({"reason": "because"}, "reason"),
    ],
)
def test_request_that_makes_no_sense_is_refused_and_none_is_written(
    sqlite_database: Engine, changes: dict[str, Any], rule: str
) -> None:
    log = EventLog(sqlite_database)
    with pytest.raises(InputError, match=rule):
        request_labels(log, [blind("fine"), blind(**changes)])
    assert log.last_seq() == 0


def test_judgement_of_each_reviewer_is_their_newest_and_in_the_order_of_the_request(database: Engine) -> None:
    log = EventLog(database)
    request_labels(log, [blind(), blind("unjudged")])
    item = item_of("r1")
    log.append(
        [
            label(item, 0, 5, preferred=1, scores={"success": 0.0}, notes="on second thoughts"),
            label(item, 1, 5, preferred=1, scores={"success": 1.0}, notes="on second thoughts"),
            label(item, 0, 2, preferred=0),
            label(item, 1, 2, preferred=0),
            label(item, 0, 3, reviewer="ann", corrected="escalate to tier 2"),
            label(item_of("another"), 0, 9, preferred=0),
        ]
    )
    found = labels_for(log, "default", ["r1", "unjudged", "unknown"])
    assert (found["unjudged"], found["unknown"]) == ([], [])
    ann, rita = found["r1"]
    assert (ann.reviewer, ann.preferred, ann.scores, ann.corrected) == ("ann", None, ({}, {}), "escalate to tier 2")
    assert (rita.preferred, rita.scores, rita.notes) == (1, ({"success": 0.0}, {"success": 1.0}), "on second thoughts")


def test_labels_of_another_tenant_are_nobodys_here(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    request_labels(log, [blind()])
    theirs = label(item_of("r1"), 0, 1, preferred=0)
    log.append([Event("label", "other", "default", theirs.body)])
    assert labels_for(log, "default", ["r1"]) == {"r1": []}
