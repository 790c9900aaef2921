"""`DELETE /v1/users/{id}` over real HTTP."""

import httpx
import pytest

from data.log import EventLog
from serve.keys import create_key
from tests.serve.conftest import Live

MESSAGES = [{"role": "user", "content": "my name is canary-77"}]


def delete(live: Live, user: str, secret: str) -> httpx.Response:
    return httpx.delete(f"{live.url}/v1/users/{user}", headers={"authorization": f"Bearer {secret}"}, timeout=60)


@pytest.fixture
def eraser(live: Live) -> str:
    secret = create_key(live.database, "privacy", "default", "default", ["erase"])
    live.app.watcher.refresh()
    return secret


def test_user_is_erased_and_refused_from_then_on(live: Live, eraser: str) -> None:
    for user in ("ann@example.com", "joe"):
        live.client().chat.completions.create(model="triage", messages=MESSAGES, user=user)  # type: ignore[arg-type]
    live.events("interaction", 2)
    first = delete(live, "ann%40example.com", eraser)
    assert (first.status_code, first.json()["object"], first.json()["events"]) == (
        200,
        "user.erased",
        {"interaction": 1},
    )
    assert delete(live, "ann@example.com", eraser).json() == first.json()
    kept = [r for r in EventLog(live.database).read(kinds=["interaction"]) if not r.erased]
    assert len(kept) == 1
    items = {"items": [{"interaction_id": "x", "type": "thumbs_up", "user": u} for u in ("ann@example.com", "joe")]}
    answer = httpx.post(f"{live.url}/v1/feedback", json=items, headers={"authorization": f"Bearer {live.secret}"})
    verdicts = [(d["status"], d.get("error", {}).get("code")) for d in answer.json()["data"]]
    assert verdicts == [("rejected", "user_erased"), ("accepted", None)]


def test_erased_user_is_still_answered_but_no_longer_captured(live: Live, eraser: str) -> None:
    live.client().chat.completions.create(model="triage", messages=MESSAGES, user="ann")  # type: ignore[arg-type]
    live.events("interaction", 1)
    assert delete(live, "ann", eraser).status_code == 200
    for user in ("ann", "joe"):
        assert live.client().chat.completions.create(model="triage", messages=MESSAGES, user=user).choices  # type: ignore[arg-type]
    assert live.events("interaction", 2)[1].event.user_id is not None
    assert [r.erased for r in EventLog(live.database).read(kinds=["interaction"])] == [True, False]


def test_key_without_the_scope_is_403_and_another_tenants_finds_nobody(live: Live, eraser: str) -> None:
    live.client().chat.completions.create(model="triage", messages=MESSAGES, user="ann")  # type: ignore[arg-type]
    live.events("interaction", 1)
    refused = delete(live, "ann", live.secret)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert delete(live, "ann", "rl-wrong").status_code == 401
    other = create_key(live.database, "other", "other", "default", ["erase"])
    live.app.watcher.refresh()
    missing = delete(live, "ann", other)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "user_not_found")
    assert delete(live, "ann", eraser).status_code == 200


@pytest.mark.parametrize(("user", "status"), [("", 400), ("x" * 257, 400), ("nobody", 404)])
def test_user_that_cannot_be_erased_says_why(live: Live, eraser: str, user: str, status: int) -> None:
    answer = delete(live, user, eraser)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, "id")


def test_other_methods_are_405(live: Live, eraser: str) -> None:
    answer = httpx.get(f"{live.url}/v1/users/ann", headers={"authorization": f"Bearer {eraser}"})
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE")
