"""HTTP client of the router: keeps connections to one engine open and passes bytes on.

A small asyncio protocol over `httptools`, because a general client costs more per request than the whole
of the router. One exchange at a time on a connection; connections that are idle wait in a stack.
"""

import asyncio
import logging
import re
import select
import ssl
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import cast

import httptools

from cluster.http_post import IDLE_CONNECTION_S
from serve.egress import Destination, ForbiddenAddressError

log = logging.getLogger(__name__)

PAUSE_BYTES = 256 * 1024  # unread bytes at which the engine is made to wait
CONNECT_PAUSE_S = 0.05  # before a refused connection is tried again
KEEP_ALIVE_TIMEOUT = re.compile(rb"timeout\s*=\s*(\d+)")


class UpstreamError(Exception):
    """The engine gave no whole answer."""

    def __init__(self, message: str, *, code: str, status: int = 502) -> None:
        super().__init__(message)
        self.message, self.code, self.status = message, code, status


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one upstream; times in seconds."""

    connect_timeout_s: float = 2.0
    silence_timeout_s: float = 120.0
    """Longest pause between two pieces of an answer, the first included."""
    max_idle: int = 256
    idle_timeout_s: float = IDLE_CONNECTION_S
    """How long a connection is kept for the next request, unless the engine says that it waits for less than 1 s more
    (`Keep-Alive: timeout=3`)."""
    max_response_bytes: int = 32_000_000
    connect_attempts: int = 2
    """How often a connection is tried. Nothing was sent yet, so trying again repeats no work."""


class Upstream:
    """One engine: its address, its credentials and its open connections.

    `allowed` names hosts that may be private (`serve.egress`); `None` trusts the address.

    Raises:
        ConfigError: the address may not be called.
    """

    def __init__(
        self, base_url: str, limits: Limits, api_key: str | None = None, *, allowed: Collection[str] | None = None
    ) -> None:
        self._destination = Destination(base_url, allowed)
        self.base_url, self.limits = base_url, limits
        self._tls = ssl.create_default_context() if self._destination.is_tls else None
        self._path = self._destination.parts.path.rstrip("/")
        self._idle: list[_Connection] = []
        lines = [f"host: {self._destination.parts.netloc}", "content-type: application/json", "accept: */*"]
        if api_key:
            lines.append(f"authorization: Bearer {api_key}")
        self._head = "\r\n".join(lines).encode()

    async def post(self, path: str, body: bytes, *, request_id: str = "") -> "Reply":
        """Send a request and wait for the head of the answer.

        A kept connection that the engine has closed is left before anything is written. What was written is never
        sent again: an engine that ended while it worked looks the same as one that closed just then.

        Raises:
            UpstreamError: no connection, silence, or not HTTP.
        """
        request = b"POST %b%b HTTP/1.1\r\n%b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b" % (
            self._path.encode(),
            path.encode(),
            self._head,
            request_id.encode(),
            len(body),
            body,
        )
        connection = self._kept() or await self._connect()
        return await connection.exchange(request, self.limits.silence_timeout_s)

    def _kept(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and not connection.expired:
                return connection
            connection.abort()
        return None

    def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    def keep(self, connection: "_Connection") -> None:
        """Take back a connection whose exchange is over."""
        if len(self._idle) < self.limits.max_idle:
            self._idle.append(connection)
        else:
            connection.abort()

    async def _connect(self) -> "_Connection":
        """A connection to one of the addresses that were checked; a refused one is tried again."""
        host = self._destination.host
        cause: Exception = TimeoutError()
        for attempt in range(self.limits.connect_attempts):
            await asyncio.sleep(attempt * CONNECT_PAUSE_S)
            try:
                async with asyncio.timeout(self.limits.connect_timeout_s):
                    return await self._connect_once()
            except ForbiddenAddressError as error:
                log.error("not connected to an engine: %s; name the host in `serve.allowed_hosts`", error)
                raise UpstreamError("its address is not allowed", code="engine_address_refused", status=503) from None
            except TimeoutError:
                cause = TimeoutError(f"no answer within {self.limits.connect_timeout_s:g} s")
                break
            except OSError as error:
                cause = error
        log.info("cannot connect to the engine at %s: %s", host, cause)
        raise UpstreamError("cannot connect to the engine", code="engine_unavailable", status=503) from None

    async def _connect_once(self) -> "_Connection":
        loop, to = asyncio.get_running_loop(), self._destination
        last: OSError | None = None
        for address in await to.addresses():
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), address, to.port,
                    ssl=self._tls, server_hostname=to.host if self._tls else None,
                )  # fmt: skip
                return connection
            except OSError as error:
                last = error
        raise last or OSError(f"{to.host} has no address")


class Reply:
    """An answer whose head has come; its body is read as it comes, or whole."""

    def __init__(self, connection: "_Connection", status: int, headers: dict[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        self._connection = connection
        self._released = False

    async def next(self) -> bytes:
        """The next piece of the body; nothing at its end.

        Raises:
            UpstreamError: it broke off or fell silent.
        """
        connection = self._connection
        while not (piece := connection.take()):
            if connection.complete:
                self._release()
                return b""
            await connection.more()
        return piece

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            UpstreamError: it broke off, fell silent or is too long.
        """
        limit = self._connection.upstream.limits.max_response_bytes
        parts = bytearray()
        while piece := await self.next():
            parts += piece
            if len(parts) > limit:
                self.abort()
                raise UpstreamError(f"the engine's answer is longer than {limit} bytes", code="engine_error")
        return bytes(parts)

    def _release(self) -> None:
        if not self._released:
            self._released = True
            self._connection.release()

    def abort(self) -> None:
        """Close the connection, which tells the engine to stop; harmless after the end."""
        if not self._released:
            self._released = True
            self._connection.abort()


@dataclass(slots=True)
class _Answer:
    """What has arrived of the current answer."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    started: bool = False
    complete: bool = False
    keep_alive: bool = False


class _Connection(asyncio.Protocol):
    """One connection: writes a request, parses its answer."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer = _Answer()
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self._paused = False
        self._idle_until = 0.0

    @property
    def usable(self) -> bool:
        """The connection is still open, also as far as the event loop has not heard of it yet."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._failure is not None:
            return False
        waiting = select.poll()
        waiting.register(transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)
        return not waiting.poll(0)  # between two answers an engine has nothing to say but that it closes

    @property
    def complete(self) -> bool:
        """The answer has come to its end."""
        return self._answer.complete

    async def exchange(self, request: bytes, wait_s: float) -> Reply:
        """Write a request and wait until the head of its answer is there."""
        assert self._transport is not None
        self._answer = _Answer()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        try:
            while not self._answer.started:
                await self._wait(wait_s)
        except (UpstreamError, asyncio.CancelledError):
            self.abort()
            raise
        return Reply(self, self._parser.get_status_code(), self._answer.headers)

    def take(self) -> bytes:
        """What has arrived since the last call."""
        if not self._answer.body:
            return b""
        piece = bytes(self._answer.body)
        self._answer.body.clear()
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return piece

    async def more(self) -> None:
        """Wait for more of the body."""
        try:
            await self._wait(self.upstream.limits.silence_timeout_s)
        except UpstreamError:
            self.abort()
            raise

    @property
    def expired(self) -> bool:
        """It has been idle for so long that the engine may be closing it."""
        return self._loop.time() >= self._idle_until

    def release(self) -> None:
        """The exchange is over: wait for another, or close."""
        idle_s = self._idle_s()
        if self._answer.keep_alive and idle_s > 0 and self.usable:
            self._idle_until = self._loop.time() + idle_s
            self.upstream.keep(self)
        else:
            self.abort()

    def _idle_s(self) -> float:
        """How long this connection may wait: less than the engine says that it will, if it says so."""
        most = self.upstream.limits.idle_timeout_s
        said = KEEP_ALIVE_TIMEOUT.search(self._answer.headers.get(b"keep-alive", b""))
        return min(most, int(said[1]) - 1.0) if said else most

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, timeout_s: float) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(timeout_s, self._expire, timeout_s)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _expire(self, timeout_s: float) -> None:
        self._fail(UpstreamError(f"the engine was silent for {timeout_s:g} s", code="engine_timeout", status=504))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Parse what came; a server that speaks out of turn is cut off."""
        if self._parser is None or self._answer.complete:
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(UpstreamError(f"the engine does not speak HTTP ({error})", code="engine_error"))
            self.abort()
            return
        if len(self._answer.body) > PAUSE_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """The end of an answer without a length, or a failure."""
        answer = self._answer
        by_length = b"content-length" in answer.headers or answer.headers.get(b"transfer-encoding") == b"chunked"
        if answer.started and not answer.complete and not by_length and error is None:
            answer.complete = True
            self._wake()
        elif answer.started and not answer.complete:
            self._fail(UpstreamError("the engine broke off its answer", code="engine_error"))
        else:
            self._fail(UpstreamError("the engine closed the connection without an answer", code="engine_unavailable"))

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the answer."""
        self._answer.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is whole (1xx heads are skipped)."""
        if self._parser is not None and self._parser.get_status_code() >= 200:
            self._answer.started = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._answer.body += body

    def on_message_complete(self) -> None:
        """The end of the answer."""
        if self._answer.started and self._parser is not None:
            self._answer.keep_alive = self._parser.should_keep_alive()
            self._answer.complete = True
