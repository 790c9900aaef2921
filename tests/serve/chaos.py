"""What breaks around a router, on purpose, and load that notices: for tests and `tests/bench/resilience.py`."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROJECT = Path(__file__).parents[2]
NO_ANSWER = 0
BROKEN = -1
"""Status of an answer that began with 200 and did not come to its end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it."""

    began: float
    seconds: float
    status: int
    arm: str | None
    version: str | None
    interaction_id: str | None
    is_stream: bool


@dataclass
class Load:
    """Requests at a steady rate, whatever becomes of them (an open loop); every other one is a stream."""

    url: str
    secret: str
    rate: float
    """Requests a second."""
    streams: bool = True
    timeout_s: float = 60.0
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, seconds: float) -> list[Outcome]:
        """Send for that long and wait for every answer."""
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"authorization": f"Bearer {self.secret}"}
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
            began = time.perf_counter()
            tasks = []
            for number in range(round(self.rate * seconds)):
                await asyncio.sleep(began + number / self.rate - time.perf_counter())
                tasks.append(asyncio.create_task(self._ask(session, self.streams and number % 2 == 1)))
            await asyncio.gather(*tasks)
        return self.outcomes

    def run_in_thread(self, seconds: float) -> threading.Thread:
        """The same beside the caller."""
        thread = threading.Thread(target=lambda: asyncio.run(self.run(seconds)))
        thread.start()
        return thread

    async def _ask(self, session: aiohttp.ClientSession, stream: bool) -> None:
        request = {
            "model": "triage", "messages": [{"role": "user", "content": "?"}], "user": uuid.uuid4().hex,
            "stream": stream,
        }  # fmt: skip
        began, status, head = time.perf_counter(), NO_ANSWER, {}
        try:
            async with session.post(f"{self.url}/chat/completions", json=request) as response:
                status, head = response.status, dict(response.headers)
                body = await response.read()
                if status == 200 and not _is_whole(body, stream):
                    status = BROKEN
        except (aiohttp.ClientError, TimeoutError, OSError):
            status = BROKEN if status == 200 else NO_ANSWER
        names = ("x-rayloop-arm", "x-rayloop-version", "x-rayloop-interaction")
        arm, version, interaction = (head.get(name) for name in names)
        seconds = time.perf_counter() - began
        self.outcomes.append(Outcome(began, seconds, status, arm, version, interaction, stream))

    def statuses(self) -> Counter[int]:
        """How many of each."""
        return Counter(outcome.status for outcome in self.outcomes)


def _is_whole(body: bytes, stream: bool) -> bool:
    if stream:
        return body.endswith(b"data: [DONE]\n\n") and b'"error"' not in body
    return bool(json.loads(body)["choices"])


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EngineProcess:
    """An engine that can be killed and started again on the same port.

    `delay_ms` passes before an answer and before each piece of a stream; at most `most` requests are answered at
    a time, the others wait.
    """

    def __init__(self, delay_ms: float = 0, most: int = 1_000_000) -> None:
        self.port = free_port()
        self._command = [
            sys.executable, "-m", "tests.bench._http", "serve", str(self.port), str(delay_ms), str(most),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, cwd=PROJECT)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "the engine did not start"
                time.sleep(0.02)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Forwarder:
    """A TCP relay that can be cut, as a network or a database server is."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.is_cut = False
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection; new ones are closed at once."""
        self.is_cut = True
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for side in pair:
                _shut(side)

    def mend(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)  # or a thread would wait for its next connection
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                self.refused += 1
                client.close()
                continue
            server = socket.create_connection(self._to)
            self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_relay, args=(source, sink), daemon=True).start()


def _relay(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    for side in (source, sink):
        _shut(side)


def _shut(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
    side.close()


def summary(load: Load) -> dict[str, Any]:
    """What the users saw."""
    good = [o.seconds for o in load.outcomes if o.status == 200]
    refused = [o.seconds for o in load.outcomes if o.status in (429, 503)]
    return {
        "requests": len(load.outcomes), "statuses": dict(load.statuses()),
        "p50_s": round(quantile(good, 0.5), 4), "p99_s": round(quantile(good, 0.99), 4),
        "refused_p99_s": round(quantile(refused, 0.99), 4),
    }  # fmt: skip
