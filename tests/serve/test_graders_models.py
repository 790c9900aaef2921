"""The grader service and models: judges that fail in every way, the cache, sandboxes, sampling of live traffic."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy.engine import Engine as Database

from cluster import metrics
from cluster.database import connect
from cluster.settings import Settings, load_settings
from data.events import Event
from data.feedback import pseudonym_secret
from data.grading.endpoint import JudgeEndpoint
from data.grading.types import Question
from data.log import EventLog
from serve.graders import GraderApi
from serve.grading import Grading
from serve.grading_models import ModelCalls
from serve.judged import JudgedAnswers
from serve.keys import create_key
from serve.known_keys import KnownKeys
from serve.online_grading import OnlineGrading
from tests.serve.upstream import Server

PROMPT = [{"role": "user", "content": "{{ sample.output_text }}"}]
SCORE: dict[str, Any] = {"type": "score_model", "name": "quality", "model": "good", "input": PROMPT}
PYTHON = {"type": "python", "name": "p", "source": "def grade(sample, item):\n    return item['n']\n"}


class Judge:
    """An OpenAI-compatible server whose model's name says how it behaves; it counts what it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.clients: set[Any] = set()
        self.scores = iter(range(1, 100))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.asked += 1
        self.clients.add(tuple(scope["client"]))
        model = json.loads(body)["model"]
        status, reply = 200, json.dumps({"result": 0.75})
        if model == "hangs":
            await asyncio.sleep(60)
        if model == "fickle":
            reply = json.dumps({"result": next(self.scores) / 100})
        choices = [{"message": {"content": reply}, "finish_reason": "stop"}]
        document = json.dumps({"choices": choices, "usage": {"total_tokens": 30}}).encode()
        if model == "fails":
            status, document = 500, b'{"error": {"message": "out of memory"}}'
        if model == "garbage":
            document = b"\x00\xff not json"
        if model == "oversize":
            document = b'{"choices": "' + b"x" * 2_000_000 + b'"}'
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": document})


class World:
    """A grader service with its judge and its database."""

    def __init__(
        self, url: str, secret: str, api: GraderApi, judge: Judge, settings: Settings, database: Database
    ) -> None:
        self.url, self.secret, self.api, self.judge, self.settings = url, secret, api, judge, settings
        self.poor = create_key(database, "poor", "default", "default", ["grade"], tokens_per_day=50)
        self.slow = create_key(database, "slow", "default", "default", ["grade"], requests_per_minute=2)

    def post(self, secret: str, grader: Any, text: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {secret}"}
        document = {"grader": grader, "model_sample": text, **body}
        return httpx.post(f"{self.url}/v1/graders/run", json=document, headers=headers, timeout=30)

    def run(self, grader: Any, text: str = "A fine answer.", **body: Any) -> dict[str, Any]:
        answer = self.post(self.secret, grader, text, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
def judge() -> Iterator[tuple[str, Judge]]:
    app = Judge()
    with Server(app) as url:
        yield url, app


@pytest.fixture(scope="module")
def world(judge: tuple[str, Judge], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    grader = {"judge_url": judge[0], "workers": 1, "deadline_s": 3.0}
    settings = load_settings(home=tmp_path_factory.mktemp("grader"), grader=grader)[0]
    database = connect(settings)
    secret = create_key(database, "judge", "default", "default", ["admin"])
    kept = JudgedAnswers(database, pseudonym_secret(settings), 30)
    api = GraderApi(settings.grader, KnownKeys(settings, 0.1), kept)
    with Server(api, "on") as url:
        yield World(url, secret, api, judge[1], settings, database)
    database.dispose()


def grades(kind: str, outcome: str) -> float:
    return metrics.REGISTRY.get_sample_value("rayloop_grades_total", {"type": kind, "outcome": outcome}) or 0.0


@pytest.mark.parametrize(
    ("model", "flag"),
    [
        ("fails", "model_grader_server_error"),
        ("garbage", "model_grader_server_error"),
        ("oversize", "model_grader_server_error"),
        ("hangs", "unresponsive_reward_error"),
    ],
)
def test_a_judge_that_fails_abstains_inside_the_deadline(world: World, model: str, flag: str) -> None:
    before = grades("score_model", flag)
    began = time.monotonic()
    grade = world.run({**SCORE, "model": model})
    assert time.monotonic() - began < 10 * world.settings.grader.deadline_s  # half of what the judge would take
    assert grade["reward"] is None and grade["metadata"]["abstained"] is True
    assert [name for name, raised in grade["metadata"]["errors"].items() if raised is True] == [flag]
    assert grades("score_model", flag) == before + 1
    assert world.run(SCORE)["reward"] == 0.75  # the service goes on


@pytest.mark.parametrize(("idle_s", "connections"), [(4.0, 1), (0.05, 2)])
def test_a_connection_to_a_judge_is_left_before_the_judge_may_close_it(
    judge: tuple[str, Judge], monkeypatch: pytest.MonkeyPatch, idle_s: float, connections: int
) -> None:
    monkeypatch.setattr("serve.grading_models.IDLE_CONNECTION_S", idle_s)
    asked = Question("/v1/chat/completions", {"model": "good"})

    async def main() -> None:
        calls = ModelCalls(4)
        for _ in range(2):
            await calls.ask(JudgeEndpoint(judge[0]), asked)
            await asyncio.sleep(0.2)
        await calls.close()

    judge[1].clients.clear()
    asyncio.run(main())
    assert len(judge[1].clients) == connections


def test_a_slow_judge_does_not_keep_others_waiting(world: World) -> None:
    parts = {"slow": {**SCORE, "model": "hangs"}, "fast": SCORE}
    multi = {"type": "multi", "name": "m", "graders": parts, "calculate_output": "slow + fast"}
    grade = world.run(multi)
    assert grade["reward"] is None and "no grade within" in grade["metadata"]["reason"]
    both = {"type": "multi", "name": "m", "graders": {"a": SCORE, "b": PYTHON}, "calculate_output": "0.5*a + 0.5*b"}
    assert world.run(both, item={"n": 0.25})["reward"] == 0.5


def test_judge_and_answer_graded_once_under_a_version(world: World) -> None:
    """A judge that changes its mind gives the same answer the same reward, also from another replica."""
    fickle = {**SCORE, "model": "fickle"}
    before = world.judge.asked
    first = world.run(fickle)
    assert world.run(fickle)["reward"] == first["reward"]
    world.api.grading._cache.clear()  # as a replica that has just started
    again = world.run(fickle)
    assert again["reward"] == first["reward"] and world.judge.asked == before + 1
    assert again["metadata"]["grader_version"] == first["metadata"]["grader_version"]
    assert world.run(fickle, "Another answer.")["reward"] != first["reward"]
    world.run({**fickle, "range": [0, 2]})  # another version is another grade
    assert world.judge.asked == before + 3


def test_equal_answers_of_a_batch_are_graded_once(world: World) -> None:
    before = world.judge.asked
    items = [{"model_sample": "same"}] * 20 + [{"model_sample": "other"}]
    found = world.run({**SCORE, "model": "fickle"}, items=items)["data"]
    assert {grade["reward"] for grade in found[:20]} == {found[0]["reward"]}
    assert world.judge.asked == before + 2


def test_official_client_runs_each_type(world: World) -> None:
    """The kinds of OpenAI's graders guide, through its own client."""
    text = {"type": "text_similarity", "name": "t", "input": "{{ sample.output_text }}", "reference": "{{ item.r }}"}
    check = {
        "type": "string_check",
        "name": "c",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.r }}",
        "operation": "ilike",
    }
    parts = {"text": {**text, "evaluation_metric": "fuzzy_match"}, "check": check}
    cases: list[tuple[Any, float]] = [
        (check, 1.0),
        ({**text, "evaluation_metric": "bleu"}, 1.0),
        ({**text, "evaluation_metric": "meteor"}, 0.9921875),
        (SCORE, 0.75),
        (PYTHON, 0.5),
        ({"type": "multi", "name": "m", "graders": parts, "calculate_output": "(text + check) / 2"}, 1.0),
    ]
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=world.secret, max_retries=0) as client:
        graders = client.fine_tuning.alpha.graders
        for config, reward in cases:
            graders.validate(grader=config)
            graded = graders.run(
                grader=config, model_sample="cats like fish here", item={"r": "Cats like fish here", "n": 0.5}
            )
            if config["type"] == "text_similarity" and config["evaluation_metric"] == "bleu":
                continue  # BLEU minds the capital
            assert graded.reward == pytest.approx(reward), config


def test_what_judges_use_counts_against_the_keys_budget(world: World) -> None:
    assert [world.post(world.poor, SCORE, f"Sentence {n}.").status_code for n in range(3)] == [200, 200, 429]
    assert world.post(world.poor, PYTHON, "x", item={"n": 0.5}).status_code == 200  # asks no judge
    refused = [world.post(world.slow, PYTHON, "x", item={"n": 0.5}) for _ in range(3)][-1]
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_metrics_are_served(world: World) -> None:
    world.run(SCORE)
    assert httpx.get(f"{world.url}/metrics").status_code == 401
    text = httpx.get(f"{world.url}/metrics", headers={"authorization": f"Bearer {world.secret}"}).text
    assert 'rayloop_grades_total{outcome="graded",type="score_model"}' in text


def test_old_grades_of_judges_are_forgotten(database: Database, settings: Settings) -> None:
    from data.grading.types import GradeResult

    kept = JudgedAnswers(database, b"secret", 30)
    key = kept.key("v", {}, {"output_text": "x"})
    assert kept.keep(key, GradeResult(0.5, {"a": 1.0}, "r", "v")).reward == 0.5
    assert kept.keep(key, GradeResult(0.9, {}, "r", "v")).reward == 0.5  # the first one stands
    assert kept.forget_old() == 0
    assert JudgedAnswers(database, b"secret", -1).forget_old() == 1
    assert kept.find(key) is None


def test_a_sample_of_live_answers_is_graded_once(database: Database, judge: tuple[str, Judge]) -> None:
    online = {"grader": {**SCORE, "model": "good"}, "share": 0.25, "detectors": False}
    learning: dict[str, Any] = {"learning": {"enabled": True}, "capture": {"enabled": True}}
    settings, _ = load_settings(grader={"judge_url": judge[0], "online": online}, **learning)
    before = judge[1].asked
    log = EventLog(database)
    body = {"messages": [{"role": "user", "content": "hi"}], "arm": "stable"}
    said = [{"role": "assistant", "content": f"Answer number {n}"} for n in range(100)]
    log.append(
        [Event("interaction", "t", "w", {**body, "response": r}, interaction_id=f"i{n}") for n, r in enumerate(said)]
    )
    log.append([Event("interaction", "t", "w", {**body, "response": said[0], "arm": "shadow"}, interaction_id="s")])

    async def rounds() -> None:
        loop = OnlineGrading(settings, database)
        grading = Grading(settings.grader)
        while await loop.round(grading):
            pass
        await loop.round(grading)  # nothing new: nothing happens
        await grading.close()

    asyncio.run(rounds())
    found = [r.event for r in log.read(kinds=["grade"])]
    assert 10 <= len(found) <= 45
    assert len({event.interaction_id for event in found}) == len(found) == judge[1].asked - before
    assert "s" not in {event.interaction_id for event in found}
    assert all(
        event.body["reward"] == 0.75 and event.body["grader_version"].startswith("score_model-") for event in found
    )
