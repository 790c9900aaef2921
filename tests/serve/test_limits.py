"""What one key may use: requests a minute, tokens a day; and how keys are rotated."""

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.errors import InputError
from cluster.settings.serving import KeyLimitSettings
from serve import limits as limits_module
from serve.keys import Key, KeyRing, create_key, list_keys, revoke_key, rotate_key
from serve.limits import KeyLimits
from serve.openai import ApiError
from tests.serve.conftest import Live, live_router

MESSAGES = [{"role": "user", "content": "?"}]


def key(**limits: int) -> Key:
    return Key("d", "k1", "ann", "default", "default", frozenset({"chat"}), None, 0, None, None, **limits)


def test_bucket_lets_a_burst_through_and_then_the_rate() -> None:
    limits, mine = KeyLimits(KeyLimitSettings(burst_s=10), replicas=2), key(requests_per_minute=120)
    for _ in range(10):  # 120 a minute, half of them here, ten seconds' worth
        limits.admit(mine, now=100.0)
    with pytest.raises(ApiError) as caught:
        limits.admit(mine, now=100.0)
    assert (caught.value.status, caught.value.code, caught.value.retry) == (429, "rate_limit_exceeded", True)
    assert caught.value.retry_after_s == pytest.approx(1.0)
    limits.admit(mine, now=101.0)
    with pytest.raises(ApiError):
        limits.admit(mine, now=101.5)
    limits.admit(key(), now=101.0)  # no limit of its own and none configured


def test_budget_is_one_for_all_replicas_and_survives_them(database: Engine) -> None:
    mine = key(tokens_per_day=100)
    first, second = (KeyLimits(KeyLimitSettings(), 2) for _ in range(2))
    for replica in (first, second):
        replica.require_budget(mine)
        replica.spend(mine, 60)
        replica.exchange(database)
    assert second.spent_today("k1") == 120
    assert first.spent_today("k1") == 60  # until its next poll
    first.exchange(database)
    fresh = KeyLimits(KeyLimitSettings(), 2)
    fresh.require_budget(mine)  # has not looked yet
    fresh.exchange(database)
    for replica in (first, second, fresh):
        with pytest.raises(ApiError) as caught:
            replica.require_budget(mine)
        assert (caught.value.code, caught.value.type, caught.value.retry) == (
            "insufficient_quota", "insufficient_quota", False,
        )  # fmt: skip
        assert caught.value.retry_after_s is not None and 0 < caught.value.retry_after_s <= 86_400


def test_budget_begins_anew_with_the_day(sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, mine = KeyLimits(KeyLimitSettings(), 1), key(tokens_per_day=10)
    limits.require_budget(mine)
    limits.spend(mine, 10)
    with pytest.raises(ApiError):
        limits.require_budget(mine)
    limits.exchange(sqlite_database)
    monkeypatch.setattr(limits_module, "_today", lambda: "2999-01-01")
    limits.require_budget(mine)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", serve={"limits": {"requests_per_minute": 6, "burst_s": 20}})


def test_client_sees_429_with_retry_after_and_other_keys_do_not(limited: Live) -> None:
    own = create_key(limited.database, "own", "default", "default", ["chat"], requests_per_minute=6000)
    limited.app.watcher.refresh()
    for _ in range(2):
        limited.client().chat.completions.create(model="triage", messages=MESSAGES)
    with pytest.raises(openai.RateLimitError) as caught:
        limited.client().chat.completions.create(model="triage", messages=MESSAGES)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["x-should-retry"] == "true"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 10
    for _ in range(5):
        limited.client(own).chat.completions.create(model="triage", messages=MESSAGES)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_answers_count_against_the_budget(live: Live, stream: bool) -> None:
    secret = create_key(live.database, "small", "default", "default", ["chat"], tokens_per_day=15)
    live.app.watcher.refresh()
    client = live.client(secret)
    for _ in range(2):  # 8 tokens each, as the engine counts them
        answer = client.chat.completions.create(model="triage", messages=MESSAGES, stream=stream)  # type: ignore[call-overload]
        assert not stream or all(chunk.usage is None for chunk in answer)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="triage", messages=MESSAGES)
    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert [m.id for m in client.models.list()]  # costs nothing
    assert live.client().chat.completions.create(model="triage", messages=MESSAGES)


def test_rotated_key_has_two_secrets_for_a_while(database: Engine) -> None:
    old = create_key(database, "ann", "acme", "main", ["chat", "grade"], requests_per_minute=7, tokens_per_day=9)
    (first,) = list_keys(database)
    usage = KeyLimits(KeyLimitSettings(), 1)
    usage.require_budget(first)
    usage.spend(first, 8)
    usage.exchange(database)
    fresh = rotate_key(database, first.key_id, overlap_s=3600, tenant="acme")
    ring = KeyRing.read(database)
    before, after = ring.find(old), ring.find(fresh)
    assert before is not None and after is not None
    assert before.expires_at_us is not None and 0 < before.expires_at_us - now_us() <= 3600e6
    assert (after.name, after.scopes, after.expires_at_us) == ("ann", frozenset({"chat", "grade"}), None)
    assert (after.requests_per_minute, after.tokens_per_day) == (7, 9)
    usage.exchange(database)
    assert usage.spent_today(after.key_id) == 8
    rotate_key(database, after.key_id, overlap_s=0)
    assert KeyRing.read(database).find(fresh) is None
    revoke_key(database, first.key_id)
    with pytest.raises(InputError, match="is revoked"):
        rotate_key(database, first.key_id, overlap_s=1)


def test_rotated_and_revoked_keys_take_effect_within_seconds(live: Live) -> None:
    client = live.client()
    (found,) = [k for k in list_keys(live.database) if k.name == "test"]
    fresh = rotate_key(live.database, found.key_id, overlap_s=0)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            live.client(fresh).models.list()
            break
        except openai.AuthenticationError:
            time.sleep(0.05)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_limit_below_one_is_refused(sqlite_database: Engine) -> None:
    with pytest.raises(InputError, match="requests_per_minute=0 must be at least 1"):
        create_key(sqlite_database, "ann", "acme", "main", requests_per_minute=0)
