"""A tool server on a real port, with a few tools of its own beside the built-in ones."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import Engine as Database

from cluster.settings import Settings, load_settings
from data.events import Event
from data.log import EventLog
from serve.breaker import Breaker
from serve.keys import create_key
from serve.known_keys import KnownKeys
from serve.tools import Caller
from serve.tools.deployment import load_tools, open_services
from serve.tools.http import ToolApi
from serve.tools.registry import Registry, tool
from serve.tools.runner import ToolRunner
from tests.serve.upstream import Server

MINE = Registry()
RELEASE = threading.Event()
WRITTEN: list[str] = []


@tool(registry=MINE)
def add(caller: Caller, a: int, b: int = 2) -> int:
    """The sum of two numbers."""
    return a + b


@tool(registry=MINE)
async def add_later(caller: Caller, a: int, b: int) -> dict[str, int]:
    """The sum of two numbers, without a thread."""
    await asyncio.sleep(0)
    return {"sum": a + b}


@tool(registry=MINE, deadline_s=0.2)
def hang(caller: Caller) -> int:
    """Never comes back by itself."""
    RELEASE.wait(60)
    return 1


@tool(registry=MINE)
def fail(caller: Caller, secret: str = "hunter2") -> int:
    """Always fails."""
    raise RuntimeError(f"with {secret}")


@tool(registry=MINE)
def lie(caller: Caller) -> int:
    """Does not give what its type says."""
    return "no number"  # type: ignore[return-value]


@tool(registry=MINE, max_result_bytes=100)
def chatter(caller: Caller, size: int) -> str:
    """As much text as asked for."""
    return "x" * size


@tool(registry=MINE)
def say(caller: Caller, size: int) -> str:
    """As much text as asked for, within the server's bound."""
    return "x" * size


@tool(registry=MINE, writes=True)
def write_down(caller: Caller, text: str, fails: bool = False) -> int:
    """Writes a text down; its place."""
    if fails:
        raise RuntimeError("disk full")
    WRITTEN.append(text)
    return len(WRITTEN)


@tool(registry=MINE, writes=True, max_result_bytes=100)
def write_and_chatter(caller: Caller, text: str, size: int) -> str:
    """Writes a text down and tells more than it may, or what its type forbids."""
    WRITTEN.append(text)
    return "x" * size if size else 5  # type: ignore[return-value]


@tool(registry=MINE, writes=True)
def write_and_say_nothing(caller: Caller, text: str) -> None:
    """Writes a text down."""
    WRITTEN.append(text)


@tool(registry=MINE, writes=True)
def write_document(caller: Caller, document: Any) -> int:
    """Writes any JSON down; how many parts it has."""
    return len(document)


class World:
    """The running server."""

    def __init__(self, url: str, secret: str, runner: ToolRunner, database: Database, settings: Settings) -> None:
        self.url, self.secret, self.runner, self.database, self.settings = url, secret, runner, database, settings
        self.log = EventLog(database)
        self.elsewhere = create_key(database, "elsewhere", "default", "elsewhere", ["tools"])
        """A key of another workspace of the same tenant."""
        self.foreign = create_key(database, "foreign", "stranger", "default", ["tools"])
        self.admin = create_key(database, "admin", "default", "default", ["admin"])
        self.slow = create_key(database, "slow", "default", "default", ["tools"], requests_per_minute=1)

    def call(self, name: str, arguments: Any = None, secret: str | None = None, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {secret or self.secret}"} | more.pop("headers", {})
        document = {"arguments": {} if arguments is None else arguments, **more}
        return httpx.post(f"{self.url}/v1/tools/{name}", json=document, headers=headers, timeout=30)

    def interactions(self, *texts: tuple[str, str], tenant: str = "default", first: int = 0) -> None:
        self.log.append(
            [
                Event(
                    "interaction",
                    tenant,
                    "default",
                    {
                        "messages": [{"role": "user", "content": asked}],
                        "response": {"role": "assistant", "content": said},
                        "arm": "stable",
                    },
                    event_id=f"interaction:i{number}",
                    agent="triage",
                    interaction_id=f"i{number}",
                )
                for number, (asked, said) in enumerate(texts, start=first)
            ]
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    learning: dict[str, Any] = {
        "learning": {"enabled": True},
        "capture": {"enabled": True},
        "feedback": {"explicit": True},
        "tools": {"body_timeout_s": 1.0, "max_ongoing_requests": 16},
        "serve": {"breaker": {"consecutive": 3, "half_open_s": 60}},
    }
    settings = load_settings(home=tmp_path_factory.mktemp("tools"), **learning)[0]
    RELEASE.clear()
    services = open_services(settings)
    runner = ToolRunner(load_tools(settings) | MINE.tools, services, settings.tools, settings.serve.breaker)
    secret = create_key(services.database, "agent", "default", "default", ["tools"])
    with Server(ToolApi(runner, settings.tools, KnownKeys(settings, 0.1)), "on") as url:
        yield World(url, secret, runner, services.database, settings)
        RELEASE.set()
    services.intake.commit.close()
    services.database.dispose()


@pytest.fixture(autouse=True)
def closed_breakers(world: World) -> None:
    """What one test broke is whole for the next."""
    for name in world.runner._breakers:
        world.runner._breakers[name] = Breaker(world.settings.serve.breaker)
