"""Clients of the real router, closed at the end, and the numbers that they give."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from serve.client import Client, ClientConfig
from serve.sender import SenderLimits
from tests.serve.conftest import Live

ASK = [{"role": "user", "content": "Is this an incident?"}]
QUICK = SenderLimits(linger_s=0.0, retry_s=0.01, exit_s=0.5, half_open_s=30.0)
Make = Callable[..., Client]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Clients that are on, and closed at the end."""
    for name in list(os.environ):
        if name.startswith("RAYLOOP_") and not name.startswith("RAYLOOP_TEST_"):
            monkeypatch.delenv(name)
    made: list[Client] = []

    def client(url: str | None, **changes: Any) -> Client:
        made.append(Client(ClientConfig(enabled=True, url=url, **({"limits": QUICK} | changes))))
        return made[-1]

    yield client
    for one in made:
        one.close()


@pytest.fixture
def rayloop(live: Live, make: Make) -> Client:
    """A client of the real router."""
    return make(live.url, api_key=live.secret)


def balanced(client: Client) -> dict[str, Any]:
    """The numbers, which must add up."""
    stats = client.stats()
    settled = sum(stats[name] for name in ("accepted", "duplicate", "rejected", "dropped", "waiting"))
    assert stats["recorded"] == settled, stats
    return stats


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "serve.client"]


def settle(client: Client, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while not done(stats := balanced(client)):
        assert time.monotonic() < deadline, stats
        threading.Event().wait(0.01)
    return stats


def at(url: str) -> AbstractContextManager[str]:
    """An address that is there already, like the services that are started."""
    return nullcontext(url)
