"""Kept connections to an engine: left in time, and nothing that was written is sent again."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from serve.proxy import Limits, Upstream, UpstreamError

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers one request a connection, or all of them, and then does with it what it is told, from a thread."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests, self.connections = 0, 0
        self.answer = ANSWER
        self.leaves_after_one = False
        self.answers_all = False
        self.may_leave, self.left = threading.Event(), threading.Event()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            self._take(connection)
            connection.sendall(self.answer)
            while self.answers_all and self._take(connection):
                connection.sendall(self.answer)
            if self.leaves_after_one:
                self.may_leave.wait(5)
                connection.shutdown(socket.SHUT_RDWR)
                self.left.set()
            elif self._take(connection):  # and ends over it, as an engine that crashes
                connection.shutdown(socket.SHUT_RDWR)

    def _take(self, connection: socket.socket) -> bool:
        data = b""
        while not data.endswith(b"{}"):
            if not (more := connection.recv(65536)):
                return False
            data += more
        self.requests += 1
        return True

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


async def ask(upstream: Upstream) -> bytes:
    return await (await upstream.post("/x", b"{}")).read()


def test_request_that_was_written_is_not_sent_again_when_the_engine_ends() -> None:
    async def main(server: Server) -> None:
        upstream = Upstream(server.url, Limits())
        assert await ask(upstream) == b"ok"
        with pytest.raises(UpstreamError, match="without an answer"):
            await ask(upstream)
        assert server.requests == 2
        upstream.close()

    with running() as server:
        asyncio.run(main(server))


def test_connection_that_the_engine_closed_is_left_although_the_loop_has_not_heard_of_it() -> None:
    async def main(server: Server) -> None:
        upstream = Upstream(server.url, Limits())
        server.leaves_after_one = True
        assert await ask(upstream) == b"ok"
        server.may_leave.set()
        assert server.left.wait(5)
        deadline = time.monotonic() + 5
        (kept,) = upstream._idle
        while kept.usable:  # blocks the loop until the end of the connection has arrived
            assert time.monotonic() < deadline
        assert kept._failure is None
        assert await ask(upstream) == b"ok"
        assert server.requests == 2
        upstream.close()

    with running() as server:
        asyncio.run(main(server))


@pytest.mark.parametrize(
    ("limits", "keep_alive", "connections"),
    [
        (Limits(), b"", 1),
        (Limits(idle_timeout_s=0.05), b"", 2),
        (Limits(), b"keep-alive: timeout=1\r\n", 2),
        (Limits(idle_timeout_s=0.05), b"keep-alive: timeout=60, max=9\r\n", 2),
        (Limits(), b"keep-alive: max=9\r\n", 1),
    ],
    ids=["kept", "idle for too long", "engine closes soon", "engine waits longer than we", "engine names no time"],
)
def test_connection_is_left_before_the_engine_may_close_it(limits: Limits, keep_alive: bytes, connections: int) -> None:
    async def main(server: Server) -> None:
        upstream = Upstream(server.url, limits)
        server.answers_all = True
        server.answer = ANSWER.replace(b"\r\n", b"\r\n" + keep_alive, 1)
        for _ in range(2):
            assert await ask(upstream) == b"ok"
            await asyncio.sleep(0.1)
        assert (server.requests, server.connections) == (2, connections)
        upstream.close()

    with running() as server:
        asyncio.run(main(server))
