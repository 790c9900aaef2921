"""The tool server over HTTP: `GET /v1/tools`, `POST /v1/tools/{name}`, and MCP at `/mcp`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from cluster.settings.tools import ToolSettings
from serve.asgi import HttpApplication, require_method, send_json
from serve.known_keys import KnownKeys
from serve.openai import ApiError, Receive, Scope, Send, parse_object, read_body, text_header
from serve.tools.mcp_server import McpServer
from serve.tools.runner import ENVELOPE, Call, ToolRunner

SCOPE = "tools"
PATH, MCP_PATH = "/v1/tools", "/mcp"
FIELDS = {"arguments", "call_id", "idempotency_key", *ENVELOPE}
MAX_ID_CHARS = 128


class ToolApi(HttpApplication):
    """The ASGI callable."""

    def __init__(self, runner: ToolRunner, settings: ToolSettings, keys: KnownKeys) -> None:
        self.runner, self._settings, self._keys = runner, settings, keys
        self._mcp = McpServer(runner, settings.max_body_bytes)

    async def respond(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if path == "/metrics":
            await self._keys.send_metrics(scope, send)
        elif path == "/healthz":
            await send_json(send, {"status": "ok", "tools": len(self.runner.tools)})
        elif path.rstrip("/") == MCP_PATH:
            await self._mcp.handle(scope, receive, send, await self._keys.admit(scope, SCOPE))
        else:
            await send_json(send, await self._answer(path, scope, receive))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The sessions of MCP, and the tools' connections."""
        async with self._mcp.running():
            yield
        await self.runner.close()

    async def _answer(self, path: str, scope: Scope, receive: Receive) -> dict[str, Any]:
        name = unquote(path.removeprefix(f"{PATH}/")) if path.startswith(f"{PATH}/") else None
        if name is None and path != PATH:
            raise ApiError(404, f"There is no {path} here; known are {PATH} and {MCP_PATH}.", code="not_found")
        require_method(scope, path, "GET" if name is None else "POST")
        key = await self._keys.admit(scope, SCOPE)
        if name is None:
            return {"object": "list", "data": [found.document() for found in self.runner.tools.values()]}
        limit, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        document = parse_object(await read_body(scope, receive, limit, timeout_s))
        given_key = text_header(scope, b"idempotency-key", MAX_ID_CHARS)
        return {
            "object": "tool.result",
            "name": name,
            "result": await self.runner.run(_call(name, document, given_key), key),
        }


def _call(name: str, document: dict[str, Any], idempotency_key: str | None) -> Call:
    """A call from a request's body and header.

    Raises:
        ApiError: 400 with the name of the field.
    """
    for field, value in document.items():
        if field not in FIELDS:
            known = ", ".join(sorted(FIELDS))
            raise ApiError(400, f"{field} is no field; known are {known}.", param=field, code="invalid_value")
        if field != "arguments" and not (value is None or (isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS)):
            message = f"{field} must be a text of 1 to {MAX_ID_CHARS} characters."
            raise ApiError(400, message, param=field, code="invalid_value")
    about = {name: document.get(name) for name in (*ENVELOPE, "call_id")}
    return Call(name, document.get("arguments", {}), about, idempotency_key or document.get("idempotency_key"))
