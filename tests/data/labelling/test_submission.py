"""What reviewers see, what they may say, and the events that come of it."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.errors import InputError
from cluster.settings import Settings
from data.events import Event, parse_body
from data.intake.items import Identity
from data.labelling.content import places, shown_items
from data.labelling.queue import LabelQueue
from data.labelling.requests import AnswerToLabel, LabelRequest, labels_for, request_labels
from data.labelling.submission import LabelParser
from data.log import EventLog
from tests.data.labelling.test_queue import ALONE, one, pair
from tests.data.labelling.test_requests import blind, item_of

ME = Identity("default", "default")


def interaction(name: str, question: str, answer: str, **body: Any) -> Event:
    body |= {
        "messages": [{"role": "user", "content": question}],
        "response": {"role": "assistant", "content": answer},
        "served_version": "triage/7",
    }
    return Event("interaction", "default", "default", parse_body("interaction", body), interaction_id=name)


@pytest.fixture
def log(sqlite_database: Engine) -> EventLog:
    return EventLog(sqlite_database)


@pytest.fixture
def parser(sqlite_database: Engine) -> LabelParser:
    return LabelParser(LabelQueue(sqlite_database, ALONE), 10_000)


def shown(log: EventLog, parser: LabelParser, settings: Settings) -> list[dict[str, Any]]:
    return shown_items(log, parser.queue.waiting("default", "default"), settings)


def test_pair_is_shown_without_versions_ids_and_personal_data(
    log: EventLog, parser: LabelParser, settings: Settings
) -> None:
    mail = "jane.doe@example.com"
    log.append([interaction("live1", f"write to {mail}", f"wrote to {mail}", context=[f"{mail} is hers"]), pair(1)])
    assert shown(log, parser, settings) == []  # the other answer is not there yet
    log.append([interaction("s1", f"write to {mail}", "cannot write")])
    (item,) = shown(log, parser, settings)
    assert item["messages"] == [{"role": "user", "content": "write to <EMAIL_1>"}]
    assert item["context"] == ["<EMAIL_1> is hers"]
    texts = {answer["message"]["content"] for answer in item["answers"]}
    assert texts == {"wrote to <EMAIL_1>", "cannot write"}
    assert [answer["answer"] for answer in item["answers"]] == ["a", "b"]
    assert not any(word in str(item) for word in ("triage/", "live1", "s1-pair", "jane"))


def test_what_still_looks_like_a_secret_is_not_shown(log: EventLog, parser: LabelParser, settings: Settings) -> None:
    spelled = interaction("i1", "who?", "jane [at] example [dot] com")
    log.append([spelled])
    request_labels(log, [one("r")])
    assert len(parser.queue.waiting("default", "default")) == 1
    assert shown(log, parser, settings) == []


def test_order_shown_is_the_requests_or_the_other_way_round_and_labels_undo_it(
    log: EventLog, parser: LabelParser, settings: Settings
) -> None:
    requests = [blind(f"r{number}") for number in range(20)]
    request_labels(log, requests)
    first_shown = set()
    for item in shown(log, parser, settings):
        texts = [answer["message"]["content"] for answer in item["answers"]]
        first_shown.add(texts[0])
        letter = "ab"[texts.index("escalate")]
        log.append(parser.parse({"item_id": item["item_id"], "preferred": letter}, ME, "rita"))
    assert first_shown == {"escalate", "close"}
    decided = labels_for(log, "default", [request.request_id for request in requests])
    assert [judgement.preferred for (judgement,) in decided.values()] == [0] * 20
    assert parser.queue.waiting("default", "default") == []


def test_pair_of_the_log_becomes_a_label_about_each_answer(log: EventLog, parser: LabelParser) -> None:
    log.append([pair(1)])
    (item,) = parser.queue.waiting("default", "default")
    letter = next(letter for letter, place in places(item).items() if place == 1)
    other = "b" if letter == "a" else "a"
    given = {
        "event_id": "mine", "item_id": item.item_id, "preferred": letter, "complexity": "high",
        "scores": {letter: {"success": 1.0}, other: {"success": 0.0, "tone": 0.5}},
    }  # fmt: skip
    events = parser.parse(given, ME, "rita")
    about = {event.interaction_id: event.body for event in events}
    assert {body["preferred"] for body in about.values()} == {"s1"}
    assert about["s1"]["scores"] == {"success": 1.0}
    assert about["live1"]["scores"] == {"success": 0.0, "tone": 0.5}
    assert {(body["reviewer"], body["complexity"]) for body in about.values()} == {("rita", "high")}
    assert [event.event_id for event in events] == ["mine", "mine.b"]
    log.append(events)
    assert [v.status for v in log.append(parser.parse(given, ME, "rita"))] == ["duplicate", "duplicate"]


def test_tie_prefers_neither(log: EventLog, parser: LabelParser) -> None:
    request_labels(log, [blind()])
    log.append(parser.parse({"item_id": item_of("r1"), "preferred": "tie"}, ME, "rita"))
    assert [j.preferred for j in labels_for(log, "default", ["r1"])["r1"]] == [None]


def test_label_carries_whose_data_it_is_so_that_an_erasure_finds_it(log: EventLog, parser: LabelParser) -> None:
    request_labels(log, [replace(blind(), user_id="u-ann")])
    (first, second) = parser.parse({"item_id": item_of("r1"), "preferred": "a", "corrected": "x"}, ME, "rita")
    assert (first.user_id, second.user_id) == ("u-ann", "u-ann")


def test_skip_is_an_event_of_its_own(log: EventLog, parser: LabelParser) -> None:
    request_labels(log, [blind()])
    (event,) = parser.parse({"item_id": item_of("r1"), "skip": True, "notes": "no idea"}, ME, "rita")
    assert (event.kind, event.body) == (
        "label.skipped", {"reviewer": "rita", "item_id": item_of("r1"), "notes": "no idea"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("text", "item"),
        ({}, "item_id"),
        ({"item_id": "nothing"}, "item_id"),
        ({"item_id": "TWO"}, "preferred"),
        ({"item_id": "TWO", "preferred": "c"}, "preferred"),
        ({"item_id": "ONE", "preferred": "a"}, "preferred"),
        ({"item_id": "ONE"}, "scores"),
        ({"item_id": "ONE", "scores": {"a": {}}}, "scores"),
        ({"item_id": "ONE", "scores": {"b": {"success": 1.0}}}, "scores"),
        ({"item_id": "ONE", "scores": {"a": {"success": 1.5}}}, "scores.a.success"),
        ({"item_id": "ONE", "scores": {"a": {"success": float("nan")}}}, "scores.a.success"),
        ({"item_id": "ONE", "scores": {"a": {"charm": 1.0}}}, "scores.a.charm.[key]"),
        ({"item_id": "ONE", "scores": {"a": {"success": "1"}}}, "scores.a.success"),
        ({"item_id": "ONE", "corrected": ""}, "corrected"),
        ({"item_id": "ONE", "corrected": "x" * 10_001}, "corrected"),
        ({"item_id": "ONE", "skip": True, "corrected": "x"}, "corrected"),
        ({"item_id": "ONE", "complexity": "huge", "corrected": "x"}, "complexity"),
        ({"item_id": "ONE", "corrected": "x", "version": "triage/1"}, "version"),
        ({"item_id": "ONE", "corrected": "x", "event_id": "a b"}, "event_id"),
        ({"item_id": "ONE", "corrected": "x", "event_id": "erasure:ada"}, "event_id"),
    ],
)
def test_label_that_breaks_a_rule_names_the_field(log: EventLog, parser: LabelParser, given: Any, field: str) -> None:
    request_labels(log, [blind("two"), one("one")])
    if isinstance(given, dict) and given.get("item_id") in ("ONE", "TWO"):
        given = given | {"item_id": item_of(given["item_id"].lower())}
    with pytest.raises(InputError) as refused:
        parser.parse(given, ME, "rita")
    assert refused.value.field == field


def test_item_of_another_tenant_is_unknown(log: EventLog, parser: LabelParser) -> None:
    request_labels(
        log, [LabelRequest("r", "other", "default", "spot_check", (AnswerToLabel("v/1", interaction_id="i"),))]
    )
    (theirs,) = parser.queue.waiting("other", "default")
    with pytest.raises(InputError, match="not in the labelling queue"):
        parser.parse({"item_id": theirs.item_id, "corrected": "x"}, ME, "rita")
