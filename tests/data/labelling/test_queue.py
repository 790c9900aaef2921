"""The queue as a projection of the log: what is in it, for whom, and how many a day."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US, now_us
from cluster.errors import NotFoundError
from cluster.settings.labelling import LabellingSettings
from data.events import Event, parse_body
from data.labelling.queue import LabelQueue, first_seq_at, room_for
from data.labelling.requests import AnswerToLabel, LabelRequest, item_id, request_labels
from data.log import EventLog
from tests.data.labelling.test_requests import blind, item_of, label

ALONE = LabellingSettings(overlap_share=0)


def pair(number: int, *, for_review: bool = True, **envelope: Any) -> Event:
    body = {
        "shadow_interaction_id": f"s{number}", "live_version": "triage/1", "shadow_version": "triage/2",
        "agreement": 0.0, "for_review": for_review,
    }  # fmt: skip
    return Event(
        "shadow.pair", envelope.pop("tenant", "default"), "default", parse_body("shadow.pair", body),
        event_id=f"s{number}-pair", interaction_id=f"live{number}", agent="triage", **envelope,
    )  # fmt: skip


def one(request_id: str, reason: Any = "spot_check", interaction_id: str = "i1", **changes: Any) -> LabelRequest:
    return LabelRequest(
        request_id, "default", "default", reason, (AnswerToLabel("triage/1", interaction_id=interaction_id),), **changes
    )


def ids(queue: LabelQueue, **who: Any) -> list[str]:
    return [item.item_id for item in queue.waiting("default", "default", **who)]


def skip(item: str, reviewer: str = "rita") -> Event:
    return Event("label.skipped", "default", "default", {"reviewer": reviewer, "item_id": item})


def test_only_marked_pairs_come_in_and_evaluations_come_first(database: Engine) -> None:
    log, queue = EventLog(database), LabelQueue(database, ALONE)
    log.append([pair(1), pair(2, for_review=False), pair(3, tenant="other")])
    request_labels(log, [one("check"), blind("evaluation")])
    waiting = queue.waiting("default", "default")
    assert [item.item_id for item in waiting] == [
        item_of("evaluation"), item_id("default", "s1-pair"), item_of("check"),
    ]  # fmt: skip
    assert [a["interaction_id"] for a in waiting[1].answers] == ["live1", "s1"]
    assert ids(queue, limit=1) == [item_of("evaluation")]


def test_item_leaves_by_a_label_or_a_skip_that_names_it(sqlite_database: Engine) -> None:
    log, queue = EventLog(sqlite_database), LabelQueue(sqlite_database, ALONE)
    request_labels(log, [blind("labelled"), blind("skipped"), one("by interaction"), blind("left")])
    assert len(ids(queue)) == 4
    about = Event("label", "default", "default", {"reviewer": "rita"}, interaction_id="i1")
    log.append([label(item_of("labelled"), 0, 1), skip(item_of("skipped")), about])
    assert ids(queue) == [item_of("left")]
    assert ids(LabelQueue(sqlite_database, ALONE)) == [item_of("left")]  # rebuilt from nothing
    assert queue.get("default", "default", item_of("labelled")).done_by == {"rita"}


def test_item_for_two_waits_for_another_person(sqlite_database: Engine) -> None:
    log, queue = EventLog(sqlite_database), LabelQueue(sqlite_database, ALONE)
    request_labels(log, [blind("r", reviewers=2)])
    log.append([label(item_of("r"), 0, 1, reviewer="rita")])
    assert (ids(queue, reviewer="rita"), ids(queue, reviewer="ann")) == ([], [item_of("r")])
    log.append([skip(item_of("r"), "ann")])
    assert ids(queue, reviewer="bob") == []


def test_overlap_sends_a_share_of_the_items_to_two(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    request_labels(log, [blind(f"r{n}") for n in range(200)])
    queue = LabelQueue(sqlite_database, LabellingSettings(overlap_share=0.25))
    double = sum(item.reviewers == 2 for item in queue.waiting("default", "default"))
    assert 30 <= double <= 70  # 50 expected; the items' names are fixed, so is this number


def test_day_has_room_for_so_many_and_keeps_some_for_each_reason(sqlite_database: Engine) -> None:
    settings = LabellingSettings(per_day=10, overlap_share=0)
    log, queue = EventLog(sqlite_database), LabelQueue(sqlite_database, settings)
    log.append([pair(n) for n in range(20)])
    assert queue.today("default", "default") == {"disagreement": 5, "evaluation": 0, "uncertainty": 0, "spot_check": 0}
    request_labels(log, [one(f"c{n}", interaction_id=f"i{n}") for n in range(20)] + [blind()])
    assert queue.today("default", "default") == {"disagreement": 5, "evaluation": 1, "uncertainty": 0, "spot_check": 5}


def test_item_of_somebody_erased_or_of_long_ago_is_gone(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, queue = EventLog(sqlite_database), LabelQueue(sqlite_database, ALONE)
    log.append([pair(1), pair(2), pair(3)])
    assert len(ids(queue)) == 3
    log.append([Event("erasure", "default", "default", parse_body("erasure", {"user_id": "u", "events": [[2, 2]]}))])
    assert ids(queue) == [item_id("default", "s1-pair"), item_id("default", "s3-pair")]
    later = now_us() + 15 * DAY_US
    monkeypatch.setattr("data.labelling.queue.now_us", lambda: later)
    assert ids(queue) == ids(LabelQueue(sqlite_database, ALONE)) == []


def test_item_of_another_workspace_is_unknown(sqlite_database: Engine) -> None:
    request_labels(EventLog(sqlite_database), [blind()])
    queue = LabelQueue(sqlite_database, ALONE)
    with pytest.raises(NotFoundError, match="not in the labelling queue"):
        queue.get("default", "lab", item_of("r1"))


def test_half_of_the_comparisons_are_shown_the_other_way_round(sqlite_database: Engine) -> None:
    request_labels(EventLog(sqlite_database), [blind(f"r{n}") for n in range(100)])
    waiting = LabelQueue(sqlite_database, ALONE).waiting("default", "default")
    assert 35 <= sum(item.flipped for item in waiting) <= 65


@given(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_room_of_a_day_is_given_out_whole(per_day: int, uncertain: float, checks: float) -> None:
    if uncertain + checks <= 1:
        room = room_for(LabellingSettings(per_day=per_day, uncertainty_share=uncertain, spot_check_share=checks))
        assert sum(room.values()) == per_day
        assert min(room.values()) >= 0


def test_first_event_since_a_time_is_found_by_halving(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    for number in range(9):
        log.append([pair(number)])
    times = [r.recorded_at_us for r in log.read()]
    for at_us in (0, times[0], times[4], times[4] + 1, times[8], times[8] + 1):
        expected = next((n for n, at in enumerate(times, 1) if at >= at_us), 10)
        assert first_seq_at(sqlite_database, at_us) == expected
