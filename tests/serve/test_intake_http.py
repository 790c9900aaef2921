from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data.log import EventLog
from serve.keys import create_key
from tests.serve.conftest import Live, live_router


def post(live: Live, path: str, body: Any, secret: str | None = None) -> httpx.Response:
    return httpx.post(f"{live.url}{path}", json=body, headers={"authorization": f"Bearer {secret or live.secret}"})


def test_each_item_is_answered_on_its_own_and_a_retry_counts_once(live: Live) -> None:
    items = [
        {"event_id": "e1", "interaction_id": "i1", "type": "thumbs_up", "user": "ann"},
        {"event_id": "e2", "interaction_id": "i1", "type": "rating", "value": 9},
        {
            "event_id": "e3",
            "interaction_id": "i1",
            "type": "correction",
            "text": "No.",
            "category": "factual",
        },
    ]
    statuses = [[d["status"] for d in post(live, "/v1/feedback", {"items": items}).json()["data"]] for _ in range(2)]
    assert statuses == [["accepted", "rejected", "accepted"], ["duplicate", "rejected", "duplicate"]]
    alone = post(live, "/v1/feedback", items[1])
    error = alone.json()["data"][0]["error"]
    assert alone.status_code == 400 and alone.json()["error"] == error
    assert (error["type"], error["param"]) == ("invalid_request_error", "value")
    events = [r.event for r in EventLog(live.database).read(kinds=["feedback"])]
    assert [(e.event_id, e.body["reward"]) for e in events] == [("e1", 1.0), ("e3", -0.5)]


@pytest.mark.parametrize(
    ("path", "kind", "item"),
    [
        ("/v1/behaviour", "behaviour", {"interaction_id": "i1", "action": "copy"}),
        ("/v1/outcomes", "outcome", {"interaction_id": "i1", "name": "resolved", "value": 1.0}),
        ("/v1/trajectories", "trajectory", {"messages": [{"role": "user", "content": "?"}]}),
    ],
)
def test_other_kinds_come_in_too(live: Live, path: str, kind: str, item: dict[str, Any]) -> None:
    assert post(live, path, item).json()["data"][0]["status"] == "accepted"
    assert len(EventLog(live.database).read(kinds=[kind])) == 1


def test_tenant_and_workspace_come_from_the_key_only(live: Live) -> None:
    secret = create_key(live.database, "other", "other", "lab", ["feedback"])
    live.app.watcher.refresh()
    item = {"interaction_id": "i1", "type": "thumbs_up"}
    assert post(live, "/v1/feedback", item | {"tenant": "default"}, secret).json()["data"][0]["status"] == "rejected"
    post(live, "/v1/feedback", item, secret)
    event = EventLog(live.database).read(kinds=["feedback"])[0].event
    assert (event.tenant, event.workspace) == ("other", "lab")


def test_key_without_the_scope_is_403(live: Live) -> None:
    secret = create_key(live.database, "chatter", "default", "default", ["chat"])
    live.app.watcher.refresh()
    assert post(live, "/v1/feedback", {}, secret).status_code == 403


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"items": 3}', b"\xff"])
def test_body_that_is_no_batch_is_400(live: Live, body: bytes) -> None:
    response = httpx.post(f"{live.url}/v1/feedback", content=body, headers={"authorization": f"Bearer {live.secret}"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.fixture
def no_implicit(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", feedback={"explicit": True, "implicit": False})


def test_switched_off_kind_says_which_switch(no_implicit: Live) -> None:
    response = post(no_implicit, "/v1/behaviour", {"interaction_id": "i1", "action": "copy"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "feature_disabled")
    assert "feedback.implicit" in response.json()["error"]["message"]
    assert post(no_implicit, "/v1/feedback", {"interaction_id": "i1", "type": "thumbs_up"}).status_code == 200


def test_nothing_is_acknowledged_while_the_log_is_away(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_self: EventLog, _batch: object) -> list[Any]:
        from cluster.errors import UnavailableError

        raise UnavailableError("the event log takes no writes")

    monkeypatch.setattr(EventLog, "append", away)
    response = post(live, "/v1/feedback", {"interaction_id": "i1", "type": "thumbs_up"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "log_unavailable")
    assert response.headers["retry-after"] == "1"
