"""The same tools through the official MCP client."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client

from tests.serve.tools.conftest import World


@asynccontextmanager
async def connected(world: World, secret: str) -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(headers={"authorization": f"Bearer {secret}"}) as http,
        Client(streamable_http_client(f"{world.url}/mcp", http_client=http)) as client,
    ):
        yield client


async def _session(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with connected(world, world.secret) as client:
        found["tools"] = {tool.name: tool for tool in (await client.list_tools()).tools}
        found["sum"] = await client.call_tool("add", {"a": 20, "b": 22})
        found["wrong"] = await client.call_tool("add", {"a": "x"})
        meta = {"rayloop/idempotency_key": "mcp-1", "rayloop/interaction_id": "i-mcp", "rayloop/session": "s-mcp"}
        found["written"] = [await client.call_tool("write_down", {"text": "m"}, meta=meta) for _ in range(2)]  # type: ignore[arg-type]
        found["rows"] = await client.call_tool("query_sql", {"query": "SELECT count(*) AS n FROM event_log"})
    return found


def test_the_official_client_lists_and_calls(world: World) -> None:
    found = asyncio.run(_session(world))
    add = found["tools"]["add"]
    assert (add.description, add.input_schema["required"]) == ("The sum of two numbers.", ["a"])
    assert add.annotations.read_only_hint and not found["tools"]["write_down"].annotations.read_only_hint
    assert found["sum"].structured_content == {"result": 42} and not found["sum"].is_error
    assert found["wrong"].is_error
    assert json.loads(found["wrong"].content[0].text)["error"]["param"] == "arguments.a"
    first, again = found["written"]
    assert first.structured_content == again.structured_content and not first.is_error
    assert found["rows"].structured_content["columns"] == ["n"]
    recorded = [r.event for r in world.log.about("default", ["i-mcp"], kinds=["tool_call"])]
    assert {e.session_id for e in recorded} <= {"s-mcp"}


def test_a_call_whose_ids_the_log_would_refuse_is_an_error(world: World) -> None:
    async def ask() -> Any:
        async with connected(world, world.secret) as client:
            return await client.call_tool("add", {"a": 1}, meta={"rayloop/session": "two words"})  # type: ignore[arg-type]

    answer = asyncio.run(ask())
    assert answer.is_error and json.loads(answer.content[0].text)["error"]["param"] == "session"


def test_messages_that_are_none_are_answered_in_json_rpc_and_others_in_ours(world: World) -> None:
    headers = {"authorization": f"Bearer {world.secret}"}
    for body in (b"{", b"[" * 100_000, b'"\xff"', b"[]", b"null"):
        sent = {**headers, "content-type": "application/json"}
        answer = httpx.post(f"{world.url}/mcp", content=body, headers=sent, timeout=30)
        assert answer.status_code == 400 and answer.json()["error"]["code"] < 0, answer.text
    for method in ("GET", "DELETE"):  # a stream that nothing would ever come on
        answer = httpx.request(
            method, f"{world.url}/mcp", headers={**headers, "accept": "text/event-stream"}, timeout=5
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert httpx.post(f"{world.url}/mcp", content=b"x" * 2_000_000, headers=headers, timeout=30).status_code == 413


def test_a_message_that_does_not_come_is_408(world: World) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(3)  # a client tells of the answer once it has sent all

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(timeout=10) as client:
            headers = {"authorization": f"Bearer {world.secret}", "content-type": "application/json"}
            return await client.post(f"{world.url}/mcp", content=slow(), headers=headers)

    assert asyncio.run(ask()).status_code == 408


def test_the_key_of_another_tenant_sees_nothing(world: World) -> None:
    world.interactions(("Where is Walrus-4711?", "In the safe."), first=40)

    async def ask() -> tuple[Any, Any, Any]:
        async with connected(world, world.foreign) as client:
            return (
                await client.call_tool("get_record", {"interaction_id": "i40"}),
                await client.call_tool("search_interactions", {"query": "Walrus-4711"}),
                await client.call_tool("query_sql", {"query": "SELECT * FROM event_log WHERE kind = 'interaction'"}),
            )

    record, hits, rows = asyncio.run(ask())
    assert record.is_error and "Walrus" not in record.content[0].text
    assert hits.structured_content == {"result": []}
    assert rows.structured_content["rows"] == []
