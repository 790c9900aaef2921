"""The same tools over MCP (streamable HTTP), by the official SDK.

Stateless: every request stands for itself, so any replica may answer it. The key of the HTTP request is the
caller; `_meta` of a call may say which trajectory it belongs to, and carry its idempotency key, under
`rayloop/…`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import mcp_types
import orjson
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from serve.asgi import require_method
from serve.keys import Key
from serve.openai import ApiError, Receive, Scope, Send, read_body
from serve.tools.call import MCP_PATH, parse_call
from serve.tools.registry import Tool
from serve.tools.runner import ToolRunner

KEY = "rayloop.key"  # where the scope carries the caller's key
META = "rayloop/"
Context = ServerRequestContext[Any, Any]


class McpServer:
    """An MCP server around a `ToolRunner`."""

    def __init__(self, runner: ToolRunner, max_body_bytes: int, body_timeout_s: float) -> None:
        self._runner = runner
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        server: Server[Any] = Server("rayloop", on_list_tools=self._list, on_call_tool=self._call)
        self._manager = StreamableHTTPSessionManager(
            server, json_response=True, stateless=True, max_request_body_size=max_body_bytes
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this is open requests are handled; enter and leave it in one task."""
        async with self._manager.run():
            yield

    async def handle(self, scope: Scope, receive: Receive, send: Send, key: Key) -> None:
        """One HTTP request on behalf of a key; POST only, as nothing is ever said to a client that has not asked.

        Raises:
            ApiError: 405, 408 or 413; what the body says is answered for in JSON-RPC.
        """
        require_method(scope, MCP_PATH, "POST")
        body = await read_body(scope, receive, self._max_body_bytes, self._body_timeout_s)
        await self._manager.handle_request({**scope, KEY: key}, _given(body, receive), send)  # type: ignore[arg-type]

    async def _list(self, _context: Context, _params: Any) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=[_described(found) for found in self._runner.tools.values()])

    async def _call(self, context: Context, params: mcp_types.CallToolRequestParams) -> mcp_types.CallToolResult:
        meta: dict[str, Any] = dict(context.meta or {})
        about = {name.removeprefix(META): value for name, value in meta.items() if name.startswith(META)}
        assert context.request is not None
        try:
            call = parse_call(about | {"arguments": params.arguments or {}})
            result: Any = await self._runner.run(params.name, call, context.request.scope[KEY])
        except ApiError as error:
            return _said({"error": error.object()}, is_error=True)
        return _said(result if isinstance(result, dict) else {"result": result})


def _described(found: Tool) -> mcp_types.Tool:
    output = found.output_schema
    if output.get("type") != "object":  # MCP's structured content is an object
        definitions = {"$defs": output.pop("$defs")} if "$defs" in output else {}
        output = {"type": "object", "properties": {"result": output}, "required": ["result"], **definitions}
    return mcp_types.Tool(
        name=found.name,
        description=found.description,
        input_schema=found.input_schema,
        output_schema=output,
        annotations=mcp_types.ToolAnnotations(read_only_hint=not found.writes, idempotent_hint=True),
    )


def _said(document: dict[str, Any], *, is_error: bool = False) -> mcp_types.CallToolResult:
    text = mcp_types.TextContent(type="text", text=orjson.dumps(document).decode())
    return mcp_types.CallToolResult(
        content=[text], structured_content=None if is_error else document, is_error=is_error
    )


def _given(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read."""
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> dict[str, Any]:
        return waiting.pop() if waiting else await receive()

    return received
