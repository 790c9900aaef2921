"""The tool server over HTTP: `GET /v1/tools`, `POST /v1/tools/{name}`, and MCP at `/mcp`."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import unquote

import orjson

from cluster import metrics
from cluster.settings.tools import ToolSettings
from serve.keys import Key
from serve.openai import (
    JSON,
    ApiError,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    header,
    parse_object,
    read_body,
    send_error,
    send_response,
    text_header,
)
from serve.tools.mcp_server import McpServer
from serve.tools.runner import ENVELOPE, Call, ToolRunner

log = logging.getLogger(__name__)

FindKey = Callable[[str], Awaitable[Key | None]]
SCOPE = "tools"
PATH, MCP_PATH = "/v1/tools", "/mcp"
FIELDS = {"arguments", "call_id", "idempotency_key", *ENVELOPE}
MAX_ID_CHARS = 128


class ToolApi:
    """The ASGI callable; `find_key` looks a bearer secret up."""

    def __init__(self, runner: ToolRunner, settings: ToolSettings, find_key: FindKey) -> None:
        self.runner, self._settings, self._find_key = runner, settings, find_key
        self._mcp = McpServer(runner, settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or start and stop with the server."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if path == "/metrics":
                await send_response(send, 200, metrics.exposition(), [metrics.CONTENT_TYPE])
            elif path == "/healthz":
                await send_response(send, 200, orjson.dumps({"status": "ok", "tools": len(self.runner.tools)}), [JSON])
            elif path.rstrip("/") == MCP_PATH:
                await self._mcp.handle(scope, receive, send, await self._authorised(scope))
            else:
                await send_response(send, 200, orjson.dumps(await self._answer(path, scope, receive)), [JSON])
        except ApiError as error:
            await send_error(send, error)
        except ClientGoneError:
            log.debug("client left before its request was whole")

    async def _answer(self, path: str, scope: Scope, receive: Receive) -> dict[str, Any]:
        name = unquote(path.removeprefix(f"{PATH}/")) if path.startswith(f"{PATH}/") else None
        if name is None and path != PATH:
            raise ApiError(404, f"There is no {path} here; known are {PATH} and {MCP_PATH}.", code="not_found")
        method = "GET" if name is None else "POST"
        if scope["method"] != method:
            raise ApiError(405, f"{path} answers {method} only.", code="method_not_allowed")
        key = await self._authorised(scope)
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

    async def _authorised(self, scope: Scope) -> Key:
        kind, _, secret = (header(scope, b"authorization") or b"").partition(b" ")
        key = await self._find_key(secret.strip().decode("latin-1")) if kind.lower() == b"bearer" else None
        if key is None:
            raise ApiError(401, "The API key is missing, wrong, revoked or expired.", code="invalid_api_key")
        if not key.may(SCOPE):
            message = f"The key {key.name} does not have the scope {SCOPE}."
            raise ApiError(403, message, code="insufficient_scope")
        return key

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            while True:
                message = await receive()
                if message["type"] == "lifespan.startup":
                    await stack.enter_async_context(self._mcp.running())
                    await send({"type": "lifespan.startup.complete"})
                elif message["type"] == "lifespan.shutdown":
                    await stack.aclose()
                    await self.runner.close()
                    await send({"type": "lifespan.shutdown.complete"})
                    return


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
