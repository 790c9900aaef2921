"""What every HTTP application of ours does around its own routes: start and stop, keys, errors in OpenAI's shape.

The router does without: it answers thousands of requests a second, and every layer is paid for by each.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import orjson

from serve.keys import Key
from serve.openai import (
    JSON,
    ApiError,
    ClientGoneError,
    Headers,
    Receive,
    Scope,
    Send,
    header,
    refuse_websocket,
    send_error,
    send_response,
)

log = logging.getLogger(__name__)

FindKey = Callable[[str], Awaitable[Key | None]]
"""Looks a bearer secret up."""


class HttpApplication:
    """An ASGI callable. Subclasses answer requests, and may hold something open while the server runs."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or start and stop with the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            await refuse_websocket(send)
            return
        begun = False

        async def sending(message: dict[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            await self.respond(path, scope, receive, sending)
        except ApiError as error:
            await send_error(send, error)
        except ClientGoneError:
            log.debug("client left before its request was whole")
        except Exception:
            log.exception("%s %s failed", scope["method"], path)
            if begun:  # the server cuts the answer off, which tells the client that it is not whole
                raise
            await send_error(send, ApiError(500, "The server failed; its log says why.", code="internal_error"))

    async def respond(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; `path` is the one below where the application is mounted.

        Raises:
            ApiError: the request is refused.
        """
        raise NotImplementedError

    def running(self) -> AbstractAsyncContextManager[None]:
        """What is open while the server runs."""
        return _nothing()

    async def _live(self, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            while True:
                message = await receive()
                if message["type"] == "lifespan.startup":
                    await stack.enter_async_context(self.running())
                else:
                    await stack.aclose()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


async def bearer_key(scope: Scope, find_key: FindKey, needed: str | None = None) -> Key:
    """The caller's key, which must carry the scope `needed`.

    Raises:
        ApiError: 401 or 403.
    """
    kind, _, secret = (header(scope, b"authorization") or b"").partition(b" ")
    key = await find_key(secret.strip().decode("latin-1")) if kind.lower() == b"bearer" else None
    if key is None:
        raise ApiError(401, "The API key is missing, wrong, revoked or expired.", code="invalid_api_key")
    if needed is not None and not key.may(needed):
        message = f"The key {key.name} does not have the scope {needed}."
        raise ApiError(403, message, code="insufficient_scope")
    return key


def require_method(scope: Scope, path: str, method: str) -> None:
    """Raise `ApiError` 405 where the request has another method."""
    if scope["method"] != method:
        raise ApiError(405, f"{path} answers {method} only.", code="method_not_allowed")


async def send_json(send: Send, body: Any, status: int = 200, headers: Headers = []) -> None:  # noqa: B006 (never changed)
    """A JSON document as a whole response."""
    await send_response(send, status, orjson.dumps(body), [JSON, *headers])
