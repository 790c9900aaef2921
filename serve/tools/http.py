"""The tool server over HTTP: `GET /v1/tools`, `POST /v1/tools/{name}`, and MCP at `/mcp`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cluster.settings.tools import ToolSettings
from serve.asgi import HttpApplication, require_method, send_json
from serve.keys import Key
from serve.known_keys import KnownKeys
from serve.openai import ApiError, Receive, Scope, Send, header, parse_object, read_body
from serve.places import Places
from serve.tools.call import MCP_PATH, PATH, parse_call
from serve.tools.mcp_server import McpServer
from serve.tools.runner import ToolRunner

SCOPE = "tools"


class ToolApi(HttpApplication):
    """The ASGI callable."""

    def __init__(self, runner: ToolRunner, settings: ToolSettings, keys: KnownKeys) -> None:
        self.runner, self._settings, self._keys = runner, settings, keys
        self._places = Places(settings.max_ongoing_requests, settings.retry_after_s)
        self._mcp = McpServer(runner, settings.max_body_bytes, settings.body_timeout_s)

    async def respond(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if path == "/metrics":
            await self._keys.send_metrics(scope, send)
        elif path == "/healthz":
            await send_json(send, {"status": "ok", "tools": len(self.runner.tools)})
        elif path.rstrip("/") == MCP_PATH:
            key = await self._keys.admit(scope, SCOPE)
            with self._places.one():
                await self._mcp.handle(scope, receive, send, key)
        else:
            await send_json(send, await self._answer(path, scope, receive))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The sessions of MCP; at the end what the tools and keys hold open is closed."""
        async with self._mcp.running():
            yield
        await self.runner.close()
        self._keys.close()

    async def _answer(self, path: str, scope: Scope, receive: Receive) -> dict[str, Any]:
        name = path.removeprefix(f"{PATH}/") if path.startswith(f"{PATH}/") else None
        if name is None and path != PATH:
            raise ApiError(404, f"There is no {path} here; known are {PATH} and {MCP_PATH}.", code="not_found")
        require_method(scope, path, "GET" if name is None else "POST")
        key = await self._keys.admit(scope, SCOPE)
        if name is None:
            return {"object": "list", "data": [found.document() for found in self.runner.tools.values()]}
        with self._places.one():
            return await self._called(name, scope, receive, key)

    async def _called(self, name: str, scope: Scope, receive: Receive, key: Key) -> dict[str, Any]:
        limit, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        document = parse_object(await read_body(scope, receive, limit, timeout_s))
        if (given_key := header(scope, b"idempotency-key")) is not None:
            document["idempotency_key"] = given_key.decode("latin-1")
        result = await self.runner.run(name, parse_call(document), key)
        return {"object": "tool.result", "name": name, "result": result}
