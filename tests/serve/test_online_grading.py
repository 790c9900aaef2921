"""What is read of live traffic beside the grades: shadow pairs and detectors."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.engine import Engine as Database

from cluster.settings import load_settings
from data.events import ROUTER, Event, interaction_event_id, parse_body
from data.log import EventLog
from serve.experiments.metrics import of_grade
from serve.grading import Grading
from serve.online_grading import OnlineGrading
from tests.serve.upstream import Server

LEARNING: dict[str, Any] = {"learning": {"enabled": True}, "capture": {"enabled": True}}
ASKED = [{"role": "user", "content": "Who owns host db-7?"}]
PAIR = {"type": "pair_model", "name": "better", "model": "judge", "input": [{"role": "user", "content": "Compare."}]}
SOURCE = "def grade(sample, item):\n    return len(sample['output_text']) / 100\n"
LONG = {"type": "python", "name": "length", "source": SOURCE}


def interaction(name: str, answer: Any, arm: str = "stable", **body: Any) -> Event:
    response = {"role": "assistant", "content": answer}
    whole = {"messages": ASKED, "arm": arm, "response": response, **body}
    return Event("interaction", "t", "w", whole, event_id=name, agent="triage", interaction_id=name)


def pair(name: str = "live", shadow: str = "shadow") -> Event:
    body = {
        "shadow_interaction_id": shadow, "live_version": "triage/1", "shadow_version": "triage/2", "agreement": 0.0,
    }  # fmt: skip
    return Event("shadow.pair", "t", "w", body, event_id=f"{name}-pair", agent="triage", interaction_id=name)


def graded(database: Database, events: list[Event], **grader: Any) -> list[Event]:
    """The grades of one round over these events."""
    log = EventLog(database)
    log.append(events)
    settings, _ = load_settings(grader=grader, **LEARNING)

    async def rounds() -> None:
        grading = Grading(settings.grader)
        loop = OnlineGrading(settings, database)
        await loop.round(grading)
        await loop.round(grading)  # nothing new: nothing happens
        await grading.close()

    asyncio.run(rounds())
    return [r.event for r in log.read(kinds=["grade"])]


class PrefersTheOwner:
    """A judge that likes the answer with a name in it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        first, _ = json.loads(body)["messages"][-1]["content"].splitlines()[:2]
        content = json.dumps({"better": "first" if "Ada" in first else "second"})
        document = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": document})


@pytest.mark.parametrize(("said", "win"), [("Ada owns it.", 1.0), ("No idea.", 0.0)])
def test_a_judge_compares_the_answers_of_a_pair_in_both_orders(
    sqlite_database: Database, said: str, win: float
) -> None:
    other = "No idea." if win else "Ada owns it."
    events = [interaction("live", said), interaction("shadow", other, "shadow"), pair()]
    with Server(PrefersTheOwner()) as url:
        online = {"pair_grader": PAIR, "detectors": False}
        (grade,) = graded(sqlite_database, events, judge_url=url, online=online)
    assert (grade.interaction_id, grade.body["score_card"]) == ("live", {"win": win})
    assert grade.body["grader"] == "better-pairs" and "reward" not in grade.body
    assert list(of_grade(grade.body)) == [("win_rate", win)]
    assert parse_body("grade", dict(grade.body))


def test_without_a_judge_of_pairs_the_rewards_are_compared(sqlite_database: Database) -> None:
    events = [interaction("live", "Ada owns it."), interaction("shadow", "Ada.", "shadow"), pair()]
    online = {"grader": LONG, "share": 1e-9, "detectors": False}
    (grade,) = graded(sqlite_database, events, online=online)
    assert grade.body["score_card"] == {"win": 1.0}
    assert grade.body["reason"] == "triage/1 against triage/2: rewards 0.12 and 0.04"


def test_a_pair_that_lacks_an_answer_is_left_out(sqlite_database: Database) -> None:
    events = [interaction("live", "Ada."), interaction("shadow", None, "shadow"), pair(), pair("live", "gone")]
    assert not graded(sqlite_database, events, online={"grader": LONG, "share": 1e-9, "detectors": False})


def test_each_report_of_an_answer_has_a_grade_of_its_own_and_the_routers_is_compared(sqlite_database: Database) -> None:
    routed = replace(interaction("live", "Ada owns it."), event_id=interaction_event_id("live", ROUTER))
    claimed = interaction("live", "Ada owns it, and more than she ever would.", "none")
    events = [claimed, routed, interaction("shadow", "Ada.", "shadow"), pair()]
    made = graded(sqlite_database, events, online={"grader": LONG, "share": 1.0, "detectors": False})
    assert {g.body["judged"]: g.body["reward"] for g in made if "judged" in g.body} == {
        routed.event_id: 0.12,
        claimed.event_id: 0.42,
    }
    (compared,) = [g for g in made if "judged" not in g.body]
    assert compared.body["reason"] == "triage/1 against triage/2: rewards 0.12 and 0.04"


def test_detectors_look_at_the_sample(sqlite_database: Database) -> None:
    passages = ["The host db-7 belongs to the payments team."]
    events = [
        interaction("grounded", "The host db-7 belongs to the payments team.", context=passages),
        interaction("invented", "It was sold to a bakery in Lisbon years ago.", context=passages),
        interaction("rude", "You are a worthless idiot and I hate you."),
        interaction("copy", "You are a worthless idiot and I hate you.", "shadow"),
    ]
    found = {g.interaction_id: g.body for g in graded(sqlite_database, events, online={"share": 1.0})}
    assert found.keys() == {"grounded", "invented", "rude"}
    told = {name: dict(of_grade(body)) for name, body in found.items()}
    assert told == {
        "grounded": {"hallucination_rate": 0.0, "toxicity_rate": 0.0},
        "invented": {"hallucination_rate": 1.0, "toxicity_rate": 0.0},
        "rude": {"toxicity_rate": 1.0},
    }
    assert len({body["grader_version"] for body in found.values()}) == 1


def test_a_defect_does_not_end_the_loop(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = load_settings(grader={"online": {"interval_s": 0.01}}, **LEARNING)
    tried = []

    async def run() -> None:
        again = asyncio.Event()

        async def fail(*_: Any) -> bool:
            tried.append(1)
            if len(tried) > 1:
                again.set()
            raise TypeError("a defect")

        loop = OnlineGrading(settings, sqlite_database)
        monkeypatch.setattr(loop, "round", fail)
        grading = Grading(settings.grader)
        loop.start(grading)
        await asyncio.wait_for(again.wait(), 10)
        await loop.close()
        await grading.close()

    asyncio.run(run())
    assert len(tried) >= 2
