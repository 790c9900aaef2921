"""Graders that abstain too often are told of, once."""

import asyncio

from sqlalchemy.engine import Engine as Database

from cluster.settings import Settings
from data.grading.types import GradeResult
from data.log import EventLog
from serve.abstentions import AbstentionAlerts, AbstentionWatch
from serve.grading import Grading


def watched(abstained: int, graded: int, window: int = 10) -> AbstentionWatch:
    watch = AbstentionWatch(0.2, window)
    for _ in range(graded):
        watch.note(GradeResult(1.0))
    for _ in range(abstained):
        watch.note(GradeResult(None, error="model_grader_server_error"))
    return watch


def test_watch_is_in_breach_above_its_share_of_a_full_window() -> None:
    assert watched(2, 8).breach() is None
    assert watched(9, 0).breach() is None  # too few to tell
    reason, facts = watched(3, 100).breach() or ("", {})
    assert reason == "3 of the latest 10 grades: model_grader_server_error most of all"
    assert facts == {"model_grader_server_error": 3}


def test_a_breach_is_told_once(settings: Settings, sqlite_database: Database) -> None:
    alerts = AbstentionAlerts(settings, sqlite_database)
    for watch in (watched(0, 10), watched(5, 5), watched(6, 5)):
        alerts.tell(watch)
    (event,) = [r.event for r in EventLog(sqlite_database).read(kinds=["operator.alert"])]
    assert (event.body["name"], event.body["facts"]) == ("abstentions", {"model_grader_server_error": 5})


def test_grading_notes_what_graders_could_not_tell(settings: Settings) -> None:
    grader = {"type": "string_check", "name": "c", "reference": "{{ item.none }}", "operation": "eq"}
    limited = settings.grader.model_copy(update={"abstention_window": 1, "workers": 1})

    async def graded() -> Grading:
        grading = Grading(limited)
        made = await grading.grader(grader)
        await grading.grade(made, {}, {"output_text": "x"}, asyncio.get_running_loop().time())  # too late
        await grading.close()
        return grading

    found = asyncio.run(graded()).abstentions.breach()
    assert found is not None and found[1] == {"unresponsive_reward_error": 1}
