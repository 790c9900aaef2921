"""Keys of the applications beside the router, while the database answers slowly or not at all."""

import asyncio
import threading
import time

import pytest
from sqlalchemy.engine import Engine as Database

from cluster.settings import Settings
from serve import known_keys
from serve.keys import KeyRing, create_key
from serve.known_keys import KnownKeys
from serve.openai import ApiError


def test_a_database_that_hangs_makes_nobody_wait_for_long(
    settings: Settings, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, released = create_key(sqlite_database, "ann", "default", "default"), threading.Event()
    monkeypatch.setattr(known_keys, "WAIT_S", 0.05)
    keys = KnownKeys(settings, refresh_s=0.0)

    async def ask() -> float:
        assert await keys.find(secret) is not None
        monkeypatch.setattr(KeyRing, "read", lambda _: released.wait(30) and KeyRing())
        began = time.monotonic()
        found = await asyncio.gather(*[keys.find(secret) for _ in range(50)])
        waited_s = time.monotonic() - began
        assert all(key is not None for key in found)  # as last known
        released.set()
        await asyncio.sleep(0)
        return waited_s

    assert asyncio.run(ask()) < 10  # the database takes 30


def test_before_the_first_reading_nobody_is_called_a_stranger(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: Settings) -> Database:
        raise OSError("the server is away")

    monkeypatch.setattr(known_keys, "connect", away)
    with pytest.raises(ApiError) as caught:
        asyncio.run(KnownKeys(settings, 1.0).find("rl-x"))
    assert (caught.value.status, caught.value.code) == (503, "not_ready")
