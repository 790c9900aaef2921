"""Uncertain answers and random ones come into the queue, as far as the day has room."""

from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US, now_us
from cluster.settings import Settings, load_settings
from data.events import Event, parse_body
from data.labelling.queue import LabelQueue
from data.labelling.sampling import sample_for_labelling
from data.log import EventLog
from tests.data.labelling.test_queue import pair


@pytest.fixture
def settings(tmp_path: Any) -> Settings:
    labelling = {"per_day": 10, "uncertainty_share": 0.3, "spot_check_share": 0.2}
    return load_settings(home=tmp_path / "home", labelling=labelling)[0]


def answer(number: int, *, tenant: str = "default", **body: Any) -> Event:
    given = {
        "messages": [{"role": "user", "content": "?"}],
        "response": {"role": "assistant", "content": "!"},
        "completion_logprobs": [-number / 10] * 3,
    }
    return Event("interaction", tenant, "default", parse_body("interaction", given | body), interaction_id=f"i{number}")


def drawn(queue: LabelQueue, reason: str, tenant: str = "default") -> set[str]:
    return {i.answers[0]["interaction_id"] for i in queue.waiting(tenant, "default") if i.reason == reason}


def test_least_sure_answers_and_random_ones_fill_their_room(database: Engine, settings: Settings) -> None:
    log, queue = EventLog(database), LabelQueue(database, settings.labelling)
    log.append([answer(n) for n in range(30)] + [answer(100 + n, tenant="other") for n in range(3)])
    log.append([answer(90, arm="shadow"), answer(91, flags={"error": "x"}), answer(92, response=None)])
    assert sample_for_labelling(database, settings, queue) == 5 + 3
    assert drawn(queue, "uncertainty") == {"i27", "i28", "i29"}
    assert len(drawn(queue, "spot_check") - drawn(queue, "uncertainty")) == 2
    assert drawn(queue, "uncertainty", "other") == {"i100", "i101", "i102"}
    assert sample_for_labelling(database, settings, queue) == 0
    assert queue.today("default", "default").total() == 5


def test_answer_is_asked_for_once_and_only_while_it_is_fresh(sqlite_database: Engine, settings: Settings) -> None:
    log, queue = EventLog(sqlite_database), LabelQueue(sqlite_database, settings.labelling)
    log.append([answer(1), pair(7), answer(2)])
    assert sample_for_labelling(sqlite_database, settings, queue, now_us() + 2 * DAY_US) == 0
    assert sample_for_labelling(sqlite_database, settings, queue) == 2
    assert sample_for_labelling(sqlite_database, settings, queue, now_us() + DAY_US // 2) == 0
