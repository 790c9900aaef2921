"""The grader over HTTP: grades, abstentions at the deadline, keys, bad input."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import orjson
import pytest

from cluster.database import connect
from cluster.settings import Settings, load_settings
from serve.graders import GraderApi, _task, build
from serve.keys import create_key, revoke_key
from serve.known_keys import KnownKeys
from serve.router import RouterApp
from tests.serve.upstream import Server

RUBRIC = {
    "type": "rubric",
    "name": "triage",
    "criteria": {
        "verdict": {
            "kind": "verdict",
            "weight": 3,
            "checks": [{"check": "json_equals", "path": "verdict", "value": "{{ item.verdict }}"}],
        },
        "format": {"kind": "format", "checks": [{"check": "valid_json"}]},
    },
}
LABEL = {"type": "dataset_label", "name": "label"}
SLOW = {"type": "dataset_label", "name": "slow", "extract": "(a+)+$"}
"""A pattern that backtracks for ages on a long run of a's with something else at the end."""
HANG = {"model_sample": "a" * 60 + "!", "item": {"reference": "a"}}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load_settings(
        home=tmp_path_factory.mktemp("grader"), grader={"deadline_s": 1.0, "workers": 2, "max_queued": 64}
    )[0]


@pytest.fixture(scope="module")
def grader(settings: Settings) -> Iterator[tuple[str, str, GraderApi]]:
    """URL, a key with scope `grade`, and the application."""
    database = connect(settings)
    secret = create_key(database, "judge", "default", "default", ["grade"])
    database.dispose()
    api = GraderApi(settings.grader, KnownKeys(settings, 0.1))
    with Server(api, "on") as url:
        yield url, secret, api


def run(url: str, secret: str, action: str = "run", **body: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}"}
    return httpx.post(f"{url}/v1/graders/{action}", json=body, headers=headers, timeout=30)


def test_rubric_and_label_give_their_rewards(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, _ = grader
    right = run(url, secret, grader=RUBRIC, model_sample='{"verdict": "close"}', item={"verdict": "close"}).json()
    assert right["reward"] == 1.0
    assert right["sub_rewards"] == {"verdict": 1.0, "format": 1.0}
    assert right["metadata"]["grader_version"].startswith("rubric-")
    assert not any(right["metadata"]["errors"].values())
    label = run(
        url, secret, grader=LABEL, model_sample='{"a": 1, "b": 2}', item={"reference": '{"a": 1, "b": 3}'}
    ).json()
    assert label["reward"] == 0.5
    unknown = run(url, secret, grader=LABEL, model_sample="x", item={}).json()
    assert unknown["reward"] is None
    assert unknown["metadata"]["abstained"] is True


def test_batch_keeps_its_order(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, _ = grader
    items = [{"model_sample": str(i % 3), "item": {"reference": "1"}} for i in range(40)]
    answer = run(url, secret, grader=LABEL, items=items).json()
    assert answer["object"] == "list"
    assert [grade["reward"] for grade in answer["data"]] == [float(i % 3 == 1) for i in range(40)]


def test_official_client_runs_and_validates(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, _ = grader
    check = {
        "type": "string_check",
        "name": "same",
        "input": "{{ sample.output_text }}",
        "reference": "yes",
        "operation": "eq",
    }
    with openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client:
        graders = client.fine_tuning.alpha.graders
        assert graders.run(grader=check, model_sample="yes").reward == 1.0  # type: ignore[arg-type]
        assert graders.run(grader=check, model_sample="no").reward == 0.0  # type: ignore[arg-type]
        assert graders.validate(grader=check).grader.name == "same"  # type: ignore[arg-type, union-attr]
        with pytest.raises(openai.BadRequestError, match=r"grader\.type='nonsense' must be one of"):
            graders.validate(grader={"type": "nonsense"})  # type: ignore[arg-type]


def test_what_misses_the_deadline_abstains_and_the_rest_is_graded(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, api = grader
    replaced = api.grading.pool.replaced
    late = run(url, secret, grader=SLOW, **HANG).json()
    assert late["reward"] is None
    assert late["metadata"]["errors"]["unresponsive_reward_error"] is True
    assert late["metadata"]["reason"] == "no grade within 1 s"
    assert api.grading.pool.replaced == replaced + 1
    mixed = run(url, secret, grader=SLOW, items=[{"model_sample": "a", "item": {"reference": "a"}}, HANG]).json()
    assert [grade["reward"] for grade in mixed["data"]] == [1.0, None]
    deadline = time.monotonic() + 20
    while api.grading.pool._idle.qsize() < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run(url, secret, grader=LABEL, model_sample="a", item={"reference": "a"}).json()["reward"] == 1.0


def test_answer_that_is_no_sample_is_refused_with_its_field(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, _ = grader
    wrong = [
        ({"grader": LABEL}, "model_sample"),
        ({"grader": LABEL, "model_sample": 5}, "model_sample"),
        ({"grader": LABEL, "model_sample": "x", "item": [1]}, "item"),
        ({"grader": "label", "model_sample": "x"}, "grader"),
        ({"grader": LABEL, "items": []}, "items"),
        ({"grader": LABEL, "items": [{"model_sample": "x"}] * 300}, "items"),
        ({"grader": LABEL, "items": [{"model_sample": "x"}, {}]}, "items.1.model_sample"),
        ({"grader": {"type": "rubric", "name": "r", "criteria": {}}, "model_sample": "x"}, "grader.criteria"),
    ]
    for body, param in wrong:
        answer = run(url, secret, **body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param
    huge = run(url, secret, grader=LABEL, model_sample="x" * 5_000_000)
    assert huge.status_code == 413
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.post(f"{url}/v1/graders/run", content=b"{", headers=headers).status_code == 400
    assert httpx.get(f"{url}/v1/graders/run", headers=headers).status_code == 405
    assert httpx.post(f"{url}/v1/other", headers=headers).status_code == 404


def test_keys_are_asked_for_and_revoked_ones_refused(grader: tuple[str, str, GraderApi], settings: Settings) -> None:
    url, _, _ = grader
    body = {"grader": LABEL, "model_sample": "x"}
    assert httpx.post(f"{url}/v1/graders/run", json=body).status_code == 401
    assert run(url, "rl-wrong", **body).json()["error"]["code"] == "invalid_api_key"
    database = connect(settings)
    chat = create_key(database, "chatter", "default", "default", ["chat"])
    extra = create_key(database, "extra", "default", "default", ["grade"])
    assert until_not(401, url, chat).json()["error"]["code"] == "insufficient_scope"
    assert until_not(401, url, extra).status_code == 200
    from serve.keys import list_keys

    key_id = next(k.key_id for k in list_keys(database) if k.name == "extra")
    revoke_key(database, key_id)
    database.dispose()
    assert until_not(200, url, extra).status_code == 401


def until_not(status: int, url: str, secret: str) -> httpx.Response:
    """The first other answer: keys are read ten times a second."""
    deadline = time.monotonic() + 20
    while (answer := run(url, secret, grader=LABEL, model_sample="x")).status_code == status:
        assert time.monotonic() < deadline
    return answer


def test_more_than_the_queue_holds_is_429(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, _ = grader
    answer = run(url, secret, grader=LABEL, items=[{"model_sample": "x"}] * 65)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"


def test_the_deadline_begins_when_the_request_is_whole(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, api = grader
    body = json.dumps({"grader": LABEL, "model_sample": "1", "item": {"reference": "1"}}).encode()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:20]
        await asyncio.sleep(api.grading.settings.deadline_s + 0.3)
        yield body[20:]

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(timeout=30) as client:
            headers = {"authorization": f"Bearer {secret}"}
            return await client.post(f"{url}/v1/graders/run", content=slowly(), headers=headers)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json().get("reward")) == (200, 1.0), answer.text


def test_slow_senders_take_places_and_no_more_than_there_are(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, api = grader
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/graders/run HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret}\r\ncontent-length: 9\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(api.grading.settings.max_queued):
            slow = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            slow.sendall(head.encode())
        deadline = time.monotonic() + 10
        while (refused := run(url, secret, grader=LABEL, model_sample="1", item={})).status_code != 429:
            assert time.monotonic() < deadline
        assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("overloaded", "1")
    while run(url, secret, grader=LABEL, model_sample="1", item={}).status_code != 200:
        assert time.monotonic() < deadline


def test_killed_workers_are_replaced(grader: tuple[str, str, GraderApi]) -> None:
    url, secret, api = grader
    for worker in list(api.grading.pool._workers):
        worker.kill()
    time.sleep(0.1)
    meanwhile = run(url, secret, grader=LABEL, model_sample="a", item={"reference": "a"}).json()
    assert meanwhile["reward"] in (None, 1.0)
    deadline = time.monotonic() + 20
    while api.grading.pool._idle.qsize() < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run(url, secret, grader=LABEL, model_sample="a", item={"reference": "a"}).json()["reward"] == 1.0


@pytest.mark.ray
@pytest.mark.slow
def test_grader_on_serve(ray_session: None, settings: Settings) -> None:
    import socket

    import ray.serve

    database = connect(settings)
    secret = create_key(database, "judge", "default", "default", ["grade"])
    database.dispose()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    ray.serve.run(build(settings), name="grader", route_prefix="/grader")
    where = ray.serve.status().applications["grader"]
    assert where.status == "RUNNING"
    url = f"http://127.0.0.1:{port}/grader"
    answer = run(url, secret, grader=LABEL, model_sample="a", item={"reference": "a"})
    if answer.status_code == 404 or not answer.is_success:
        raise AssertionError(answer.text)
    assert answer.json()["reward"] == 1.0
    ray.serve.shutdown()


def test_the_pool_is_gone_after_close(settings: Settings) -> None:
    async def life() -> list[int | None]:
        from serve.grading_pool import GraderPool

        pool = GraderPool(settings.grader)
        await pool.start()
        workers = list(pool._workers)
        await pool.close()
        return [worker._process.returncode for worker in workers]

    assert asyncio.run(life()) == [-9, -9]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("text", ["1" * 30, nested(300), '"\\ud800"', '{"a": NaN}', "no JSON"])
def test_an_answer_that_is_odd_json_is_graded_as_a_text(text: str) -> None:
    """Whatever a model writes, its task can be handed to a worker."""
    item, sample = _task({"model_sample": text, "item": {"a": 1}}, "")
    assert sample == {"output_text": text}
    assert orjson.dumps([item, sample])


def test_an_answer_that_is_json_is_handed_on_as_such() -> None:
    assert _task({"model_sample": '{"a": 1}'}, "")[1]["output_json"] == {"a": 1}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("items.0.item", {"items": [{"model_sample": "x", "item": {"a": "DEEP"}}]}),
        ("output_tools", {"model_sample": "x", "output_tools": ["DEEP"]}),
        ("grader", {"model_sample": "x", "grader": LABEL | {"reference": "DEEP"}}),
    ],
)
def test_what_is_nested_too_deeply_is_refused_by_its_name(
    grader: tuple[str, str, GraderApi], param: str, body: dict[str, object]
) -> None:
    url, secret, _ = grader
    text = json.dumps({"grader": LABEL} | body).replace('"DEEP"', nested(300))
    headers = {"authorization": f"Bearer {secret}"}
    answer = httpx.post(f"{url}/v1/graders/run", content=text, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


class Mounted:
    """Router and grader under one address, as Serve's ingress has them."""

    def __init__(self, router: RouterApp, grader: GraderApi) -> None:
        self.router, self.grader = router, grader

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.grader(scope, receive, send)
        elif scope["path"].startswith("/grader/"):
            await self.grader({**scope, "root_path": "/grader"}, receive, send)
        else:
            await self.router(scope, receive, send)


def test_openais_client_finds_the_grader_through_the_router(
    grader: tuple[str, str, GraderApi], settings: Settings
) -> None:
    secret = grader[1]
    router = RouterApp(settings, default_engine_url="http://127.0.0.1:9")
    router.start()
    router.watcher.refresh()
    with Server(Mounted(router, GraderApi(settings.grader, KnownKeys(settings, 0.1))), "on") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)
        same: Any = {
            "type": "string_check", "name": "same", "operation": "eq",
            "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
        }  # fmt: skip
        found = client.fine_tuning.alpha.graders.run(grader=same, model_sample="yes", item={"answer": "yes"})
        assert found.reward == 1.0
        assert client.fine_tuning.alpha.graders.validate(grader=same).grader is not None
        client.close()
    router.stop()
