"""The tool server where it lives: a Serve application of its own."""

import asyncio
from pathlib import Path

import httpx
import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client

from cluster.database import connect
from cluster.settings import load_settings
from serve.keys import create_key
from serve.ports import free_ports
from serve.tools.deployment import build


@pytest.mark.ray
@pytest.mark.slow
def test_tools_and_mcp_through_serve(ray_session: None, tmp_path: Path) -> None:
    import ray.serve

    settings = load_settings(home=tmp_path / "home")[0]
    database = connect(settings)
    secret = create_key(database, "agent", "default", "default", ["tools"])
    database.dispose()
    (port,) = free_ports(1)
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    ray.serve.run(build(settings), name="tools", route_prefix="/tools")
    url, headers = f"http://127.0.0.1:{port}/tools", {"authorization": f"Bearer {secret}"}
    names = {t["function"]["name"] for t in httpx.get(f"{url}/v1/tools", headers=headers, timeout=30).json()["data"]}
    assert names == {"query_sql", "search_interactions", "get_record", "submit_feedback"}
    body = {"arguments": {"query": "SELECT count(*) AS n FROM event_log"}}
    found = httpx.post(f"{url}/v1/tools/query_sql", json=body, headers=headers, timeout=30).json()
    assert found["result"]["rows"] == [[0]]

    async def over_mcp() -> bool:
        async with (
            httpx2.AsyncClient(headers=headers, timeout=30) as http,
            Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
        ):
            answer = await client.call_tool("query_sql", body["arguments"])
            return bool(answer.structured_content["rows"] == [[0]])

    assert asyncio.run(over_mcp())
    ray.serve.shutdown()
