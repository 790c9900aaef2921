"""The labelling queue over HTTP: what waits, what is said, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data.labelling.requests import labels_for, request_labels
from data.log import EventLog
from serve.keys import create_key
from tests.data.labelling.test_requests import blind, item_of
from tests.serve.conftest import Live, live_router


def queue(live: Live, secret: str | None = None, **query: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret or live.secret}"}
    return httpx.get(f"{live.url}/v1/labels/queue", params=query, headers=headers)


def post(live: Live, body: Any, secret: str | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret or live.secret}"}
    return httpx.post(f"{live.url}/v1/labels", json=body, headers=headers)


def test_each_item_is_answered_on_its_own_and_judged_items_leave(live: Live) -> None:
    log = EventLog(live.database)
    request_labels(log, [blind("one"), blind("two"), blind("three", reviewers=2)])
    assert [item["item_id"] for item in queue(live, limit=2).json()["data"]] == [item_of("one"), item_of("two")]
    items = [
        {"event_id": "l1", "item_id": item_of("one"), "preferred": "a", "scores": {"a": {"success": 1.0}}},
        {"event_id": "l2", "item_id": item_of("two"), "preferred": "c"},
        {"event_id": "l3", "item_id": item_of("two"), "skip": True},
        {"event_id": "l4", "item_id": item_of("three"), "preferred": "tie", "reviewer": "ann"},
        "nothing",
    ]
    statuses = [[d["status"] for d in post(live, {"items": items}).json()["data"]] for _ in range(2)]
    assert statuses == [
        ["accepted", "rejected", "accepted", "accepted", "rejected"],
        ["duplicate", "rejected", "duplicate", "duplicate", "rejected"],
    ]
    error = post(live, items[1]).json()["data"][0]["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "preferred")
    assert [item["item_id"] for item in queue(live).json()["data"]] == [item_of("three")]
    assert item_of("three") not in queue(live, reviewer="ann").text
    (judgement,) = labels_for(log, "default", ["one"])["one"]
    assert (judgement.reviewer, judgement.preferred is not None) == ("test", True)


def test_version_is_nowhere_in_what_is_shown(live: Live) -> None:
    request_labels(EventLog(live.database), [blind()])
    shown = queue(live).text
    assert "escalate" in shown
    assert not any(word in shown for word in ("triage/1", "triage/2", "version"))


@pytest.mark.parametrize("limit", ["0", "-1", "201", "many", "1.5", ""])
def test_limit_out_of_bounds_is_400(live: Live, limit: str) -> None:
    response = queue(live, limit=limit)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"items": 3}', b"\xff", b'{"items": [], "more": 1}'])
def test_body_that_is_no_batch_is_400(live: Live, body: bytes) -> None:
    response = httpx.post(f"{live.url}/v1/labels", content=body, headers={"authorization": f"Bearer {live.secret}"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_key_without_the_scope_is_403(live: Live) -> None:
    secret = create_key(live.database, "chatter", "default", "default", ["chat", "feedback"])
    live.app.watcher.refresh()
    assert (queue(live, secret).status_code, post(live, {}, secret).status_code) == (403, 403)


@pytest.fixture
def routing_only(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", learning={"enabled": False})


def test_with_learning_off_nothing_is_labelled(routing_only: Live) -> None:
    response = queue(routing_only)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "feature_disabled")
