"""Every route with the key of another tenant: nothing of the first one comes back, and nothing of it changes.

The routes are read from the application, so one that is added later is tried too, or fails here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data.labelling.queue import LabelQueue
from data.labelling.requests import AnswerToLabel, LabelRequest, request_labels
from data.log import EventLog
from serve.keys import SCOPES, create_key
from serve.router import operations
from serve.routes import RouteKey, read_routes, update_route
from tests.serve.conftest import Live, live_router, serve_version

SECRET_WORDS = ("triage", "Walrus-4711", "sesame-user")
OPEN = {"/healthz", "/openapi.json"}
"""Routes without a key; they name nothing of anybody."""
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"model": "triage", "messages": [{"role": "user", "content": "?"}]},
    "/v1/completions": {"model": "triage", "prompt": "?"},
    "/v1/feedback": {"interaction_id": "INTERACTION", "type": "thumbs_up", "user": "sesame-user"},
    "/v1/behaviour": {"interaction_id": "INTERACTION", "action": "copy", "user": "sesame-user"},
    "/v1/outcomes": {"interaction_id": "INTERACTION", "name": "n", "value": 1.0},
    "/v1/trajectories": {"messages": [{"role": "user", "content": "?"}]},
    "/v1/traces": {"items": []},
    "/v1/labels": {"item_id": "ITEM", "scores": {"a": {"success": 1.0}}},
    "/v1/fine_tuning/jobs": {"model": "triage/1", "training_file": "FILE"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, str, dict[str, str]]]:
    """A tenant with a route, a file and an interaction, and the key of another one with every scope."""
    home: Path = tmp_path_factory.mktemp("tenants") / "home"
    for live in live_router(home):
        mine = create_key(live.database, "mine", "default", "default", ["admin"])
        foreign = create_key(live.database, "foreign", "other", "default", list(SCOPES))
        live.app.watcher.refresh()
        live.app.reconfigure(
            {"routes": [{"agent": "triage", "candidate": "triage/99"}]}
        )  # a reason nobody else may read
        live.app.watcher.refresh()
        client = live.client(mine)
        line = {"messages": [{"role": "user", "content": "Walrus-4711"}, {"role": "assistant", "content": "x"}]}
        rows = "\n".join(json.dumps(line) for _ in range(12)).encode()
        file = client.files.create(file=("Walrus-4711.jsonl", rows), purpose="fine-tune")
        answer = client.chat.completions.create(
            model="triage", messages=[{"role": "user", "content": "Walrus-4711"}], user="sesame-user"
        )
        live.events("interaction", 1)
        yield live, foreign, {"INTERACTION": answer.id, "FILE": file.id, "ITEM": ask_for_a_label(live, answer.id)}


@pytest.fixture(scope="module")
def twin(world: tuple[Live, str, dict[str, str]]) -> str:
    """The key of a tenant that has an agent of the same name, with a version of its own."""
    live = world[0]
    serve_version(live.database, "triage/7", "base", tenant="twin")
    update_route(live.database, RouteKey("twin", "triage"), {"stable": "triage/7"}, writer="person:test")
    secret = create_key(live.database, "twin", "twin", "default", list(SCOPES))
    live.app.watcher.refresh()
    return secret


def ask_for_a_label(live: Live, interaction_id: str) -> str:
    answers = (AnswerToLabel("triage/1", interaction_id=interaction_id),)
    request_labels(EventLog(live.database), [LabelRequest("r", "default", "default", "spot_check", answers)])
    (waiting,) = LabelQueue(live.database, live.settings.labelling).waiting("default", "default")
    return waiting.item_id


def filled(path: str, names: dict[str, str]) -> str:
    """A path with the first tenant's ids where it takes one."""
    return path.format(id="sesame-user", model="triage", file_id=names["FILE"], job_id=names["FILE"])


def body_of(path: str, names: dict[str, str]) -> str:
    text = json.dumps(BODIES.get(path, {}))
    for name, value in names.items():
        text = text.replace(name, value)
    return text


@pytest.mark.parametrize(("method", "path"), operations())
def test_route_shows_and_changes_nothing_of_another_tenant(
    world: tuple[Live, str, dict[str, str]], method: str, path: str
) -> None:
    live, foreign, names = world
    before = read_routes(live.database)
    asked = live.engine.requests.copy()
    response = httpx.request(
        method, live.url + filled(path, names), content=body_of(path, names) if method == "POST" else None,
        headers={"authorization": f"Bearer {foreign}", "content-type": "application/json"}, timeout=20,
    )  # fmt: skip
    assert response.status_code < 500
    if path in OPEN:
        assert not any(word in response.text for word in SECRET_WORDS)
        return
    told = (
        response.text.replace("'triage'", "").replace("triage/1", "") if response.status_code >= 400 else response.text
    )
    assert not any(word in told for word in (*SECRET_WORDS, names["INTERACTION"])), response.text
    if "{" in path or path in ("/v1/chat/completions", "/v1/completions"):
        assert response.status_code == 404
    assert read_routes(live.database) == before
    assert live.engine.requests == asked


@pytest.mark.parametrize(("method", "path"), [r for r in operations() if r[1] not in OPEN])
@pytest.mark.parametrize("key", [None, "Bearer rl-wrong", "Basic cmw6cmw=", "Bearer"])
def test_route_wants_a_key(world: tuple[Live, str, dict[str, str]], method: str, path: str, key: str | None) -> None:
    live, _, names = world
    headers = {"authorization": key} if key else {}
    response = httpx.request(method, live.url + filled(path, names), headers=headers, timeout=20)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "triage/1", "messages": [{"role": "user", "content": "?"}]}),
        ("/v1/completions", {"model": "triage/2", "prompt": "?"}),
        ("/v1/fine_tuning/jobs", {"model": "triage/1", "training_file": "FILE"}),
    ],
)
def test_a_route_of_the_same_name_opens_nothing_of_another_tenant(
    world: tuple[Live, str, dict[str, str]], twin: str, path: str, body: dict[str, Any]
) -> None:
    live, _, names = world
    headers = {"authorization": f"Bearer {twin}"}
    asked = live.engine.requests.copy()
    text = json.dumps(body).replace("FILE", names["FILE"])
    answer = httpx.post(live.url + path, content=text, headers=headers, timeout=20)
    assert answer.status_code == 404, answer.text
    assert live.engine.requests == asked
    listed = httpx.get(f"{live.url}/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["triage", "triage/7"]
    assert httpx.get(f"{live.url}/v1/models/triage%2F1", headers=headers).status_code == 404


def test_what_is_the_first_tenants_is_still_there(world: tuple[Live, str, dict[str, str]]) -> None:
    live, _, names = world
    key = create_key(live.database, "again", "default", "default", ["admin"])
    live.app.watcher.refresh()
    assert live.client(key).files.retrieve(names["FILE"]).filename == "Walrus-4711.jsonl"
    found = [r.event for r in live.events("interaction", 1)]
    assert found[0].user_id is not None
    assert not [r for r in live.events("feedback", 0) if r.event.tenant == "default"]
    assert not live.events("label", 0)
    mine = httpx.get(f"{live.url}/v1/labels/queue", headers={"authorization": f"Bearer {key}"}).json()
    assert [item["item_id"] for item in mine["data"]] == [names["ITEM"]]
