"""OpenAI's shapes on the wire: the error object, response heads, bodies read within a bound.

Everything here works on raw ASGI, because the router answers thousands of requests a second and a
framework in front of it costs more than the work itself.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import orjson

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
SHOWN_CHARACTERS = 200  # of a wrong value, in an error message
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
RETRIED = {408, 409, 429}  # besides every 5xx; the statuses that OpenAI's clients try again


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        retry_after_s: float | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.type = type or TYPES.get(status, "server_error")
        self.retry_after_s = retry_after_s
        self.retry = retry if retry is not None else status in RETRIED or status >= 500

    def body(self) -> bytes:
        """The JSON document."""
        return orjson.dumps({"error": self.object()})

    def object(self) -> dict[str, Any]:
        """The error object itself: message, type, param, code."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def headers(self) -> Headers:
        """What a client needs in order to decide whether to come again."""
        headers: Headers = [JSON, (b"x-should-retry", b"true" if self.retry else b"false")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(self.retry_after_s))))
            headers.append((b"retry-after-ms", b"%d" % round(self.retry_after_s * 1000)))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.status == 413:
            headers.append((b"connection", b"close"))
        return headers


def unknown_model(model: Any, known: Iterable[str]) -> ApiError:
    """404 with the ids that would work."""
    ids = ", ".join(sorted(known)) or "none yet"
    return ApiError(
        404,
        f"The model {shown(model)} does not exist or you have no access to it. Known: {ids}.",
        code="model_not_found",
        param="model",
    )


def from_engine(status: int, body: bytes) -> ApiError:
    """An engine's error in OpenAI's shape, whatever it looked like."""
    error: Any = None
    try:
        document = orjson.loads(body)
        error = document.get("error", document) if isinstance(document, dict) else None
    except orjson.JSONDecodeError:
        pass
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        text = body[:SHOWN_CHARACTERS].decode(errors="replace").strip()
        error = {"message": text or f"the engine answered {status}"}
    message = error.get("message") or error.get("detail") or f"the engine answered {status}"
    code = error.get("code")
    kind = error.get("type")
    return ApiError(
        status,
        message if isinstance(message, str) else orjson.dumps(message).decode(),
        code=code if isinstance(code, str) else None,
        param=error.get("param") if isinstance(error.get("param"), str) else None,
        type=kind if isinstance(kind, str) and "_" in kind else None,
    )


def shown(value: Any) -> str:
    """A value from outside as it may stand in a message: quoted, and not too long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _unpacked(scope: Scope, body: bytes, limit: int) -> bytes:
    """The body without its `content-encoding`: gzip or none; never more than `limit` bytes.

    Raises:
        ApiError: 415 for another encoding, 400 for broken gzip, 413 when it unfolds to too much.
    """
    encoding = (header(scope, b"content-encoding") or b"identity").strip().lower()
    if encoding == b"identity":
        return body
    if encoding != b"gzip":
        message = f"The content-encoding {shown(encoding.decode('latin-1'))} is not understood; use gzip or none."
        raise ApiError(415, message, code="unsupported_encoding")
    reader = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        plain = reader.decompress(body, limit + 1)
    except zlib.error as error:
        raise ApiError(400, f"The body is not valid gzip: {error}.", code="invalid_gzip") from None
    if len(plain) > limit:
        raise _too_long(limit)
    if not reader.eof:
        raise ApiError(400, "The body is not valid gzip: it breaks off.", code="invalid_gzip")
    return plain


async def read_body(scope: Scope, receive: Receive, limit: int, timeout_s: float) -> bytes:
    """The request body, up to `limit` bytes as it was sent and without its `content-encoding`.

    Raises:
        ApiError: 413 when it is or becomes longer, 408 when it does not come in time, 415 or 400 by its encoding.
        ClientGoneError: the client went away before its end.
    """
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise _too_long(limit)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _whole_body(receive, limit)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} seconds.", code="body_timeout") from None
    return _unpacked(scope, body, limit)


async def _whole_body(receive: Receive, limit: int) -> bytes:
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts += message.get("body", b"")
        if len(parts) > limit:
            raise _too_long(limit)
        if not message.get("more_body"):
            return bytes(parts)


class ClientGoneError(Exception):
    """The client closed its connection or stopped reading; there is nobody to answer."""


def sending_within(send: Send, timeout_s: float) -> Send:
    """`send` to a client that may take so long over each message; one that stops reading counts as gone.

    The returned function raises `ClientGoneError`.
    """

    async def bounded(message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await send(message)
        except TimeoutError:
            raise ClientGoneError from None

    return bounded


def _too_long(limit: int) -> ApiError:
    return ApiError(413, f"The request body is longer than {limit} bytes.", code="body_too_large")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: 400 with what is wrong: not UTF-8, not JSON, nested too deeply, not an object.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, f"The body must be a JSON object, not {shown(document)}.", code="invalid_json")
    return document


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return value  # type: ignore[no-any-return]
    return None


def text_header(scope: Scope, name: bytes, limit: int = 256) -> str | None:
    """The same as text; a value that is not ASCII or too long counts as absent."""
    value = header(scope, name)
    if not value or len(value) > limit or not value.isascii():
        return None
    text = value.decode("ascii").strip()
    return text or None


class ClientWatch:
    """Cancels the task that answers when its client goes away; for servers that do not do so themselves.

    Hand `receive` of this object to the handler: the watch begins when the body is complete.
    """

    def __init__(self, receive: Receive) -> None:
        self.gone = False
        self._receive = receive
        self._answering = asyncio.current_task()
        self._watching: asyncio.Task[None] | None = None

    async def receive(self) -> dict[str, Any]:
        """The server's `receive`, until the body is complete."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._watching = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._answering is not None:
            self._answering.cancel()

    def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()


async def send_response(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """A whole response."""
    head = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def refuse_websocket(send: Send) -> None:
    """Close before it opens, which the server answers 403."""
    await send({"type": "websocket.close"})


async def send_error(send: Send, error: ApiError, headers: Headers = []) -> None:  # noqa: B006 (never changed)
    """An error response."""
    await send_response(send, error.status, error.body(), [*error.headers(), *headers])
