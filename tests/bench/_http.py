"""A bare HTTP upstream and a load generator for benchmarks, both on raw asyncio protocols.

`python -m tests.bench._http serve PORT [DELAY_MS [MOST]]` answers chat completions with fixed bytes, after a delay
(before each piece of a stream too), at most so many at a time.
`python -m tests.bench._http load URL KEY MODEL STREAM CONNECTIONS SECONDS` prints one JSON object.
"""

import asyncio
import json
import sys
import time
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

WORDS = ["Close", " it", ":", " the", " change", " ticket", " explains", " it."]
TEXT = "".join(WORDS)


def whole(request: dict[str, Any]) -> bytes:
    """The answer to a request, as our engines give it."""
    choice: dict[str, Any] = {
        "index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop",
        "logprobs": None,
    }  # fmt: skip
    document = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20},
    }  # fmt: skip
    if request.get("return_token_ids"):
        document["prompt_token_ids"] = list(range(12))
        choice["token_ids"] = list(range(8))
        choice["logprobs"] = {"content": [{"token": word, "logprob": -0.25} for word in WORDS]}
    return json.dumps(document).encode()


def chunks(request: dict[str, Any]) -> list[bytes]:
    """The same as a stream of events."""
    events = []
    for number, word in enumerate([*WORDS, None]):
        delta = {} if word is None else {"content": word} | ({"role": "assistant"} if number == 0 else {})
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None if word else "stop"}
        document = {
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": request["model"],
            "choices": [choice],
        }  # fmt: skip
        if request.get("return_token_ids") and word is not None:
            choice["logprobs"] = {"content": [{"token": word, "logprob": -0.25}]}
        if request.get("return_token_ids") and word is None:
            document["prompt_token_ids"] = list(range(12))
            choice["token_ids"] = list(range(8))
        events.append(b"data: " + json.dumps(document).encode() + b"\n\n")
    return [*events, b"data: [DONE]\n\n"]


class Upstream(asyncio.Protocol):
    """Answers every POST with a completion, whole or streamed."""

    def __init__(self, delay_s: float = 0.0, room: asyncio.Semaphore | None = None) -> None:
        self._delay_s, self._room = delay_s, room

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        request, self._body = json.loads(self._body or b"{}"), b""
        if self._room is not None:
            self._answering = asyncio.ensure_future(self._answer_slowly(request, self._room))
        elif "model" not in request:
            self._send(b"application/json", b'{"data": []}')
        elif request.get("stream"):
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self._transport.write(head)
            for event in chunks(request):  # a write each, as an engine's tokens come
                self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
            self._transport.write(b"0\r\n\r\n")
        else:
            self._send(b"application/json", whole(request))

    async def _answer_slowly(self, request: dict[str, Any], room: asyncio.Semaphore) -> None:
        async with room:
            await asyncio.sleep(self._delay_s)
            if not request.get("stream"):
                self._send(b"application/json", whole(request) if "model" in request else b"{}")
                return
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self._transport.write(head)
            for event in chunks(request):
                self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
                await asyncio.sleep(self._delay_s)
            self._transport.write(b"0\r\n\r\n")

    def _send(self, kind: bytes, body: bytes) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)
        )


class Client(asyncio.Protocol):
    """Sends one request after the other on one connection until told to stop."""

    def __init__(self, request: bytes, results: "Results") -> None:
        self._request, self._results = request, results

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._results.add(self._parser.get_status_code(), self._began)
        if time.perf_counter() < self._results.until:
            asyncio.get_running_loop().call_soon(self._send)
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._results.closed += 1
        if time.perf_counter() < self._results.until:
            self._results.broken += 1
        if self._results.closed == self._results.connections:
            self._results.done.set_result(None)


class Results:
    """What one load came to."""

    def __init__(self, connections: int, seconds: float) -> None:
        self.connections = connections
        self.began = time.perf_counter()
        self.until = self.began + seconds
        self.latencies: list[float] = []
        self.failed = self.broken = self.closed = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, status: int, began: float) -> None:
        self.latencies.append(time.perf_counter() - began)
        self.failed += status != 200

    def summary(self) -> dict[str, float]:
        ordered = sorted(self.latencies)
        seconds = time.perf_counter() - self.began
        return {
            "requests": len(ordered), "failed": self.failed + self.broken, "rps": len(ordered) / seconds,
            "p50_ms": 1000 * ordered[len(ordered) // 2], "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
        }  # fmt: skip


def request_bytes(url: str, key: str, model: str, stream: bool, user: int) -> bytes:
    """A whole HTTP request for one chat completion."""
    parts = urlsplit(url)
    document = {
        "model": model, "stream": stream, "user": f"user-{user}", "temperature": 0.2, "max_tokens": 64,
        "messages": [
            {"role": "system", "content": "You triage alerts. Say what to do, in one sentence."},
            {"role": "user", "content": "CPU 97% on payments-api-3 for 12 minutes; change CHG-1042 is open."},
        ],
    }  # fmt: skip
    body = json.dumps(document).encode()
    head = (
        f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\n"
        f"authorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def generate(url: str, key: str, model: str, stream: bool, connections: int, seconds: float) -> dict[str, float]:
    """Load on `url` from that many connections, each one user."""
    results = Results(connections, seconds)
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    for user in range(connections):
        request = request_bytes(url, key, model, stream, user)
        await loop.create_connection(lambda r=request: Client(r, results), parts.hostname, parts.port)  # type: ignore[misc]
    await asyncio.wait_for(results.done, seconds + 60)
    return results.summary()


async def serve(port: int, delay_s: float = 0.0, most: int | None = None) -> None:
    """The upstream, for ever."""
    room = asyncio.Semaphore(most) if most else None
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(delay_s, room), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """The two commands."""
    if sys.argv[1] == "serve":
        delay_ms, most = (*sys.argv[3:], "0", "0")[:2]
        uvloop.run(serve(int(sys.argv[2]), float(delay_ms) / 1000, int(most) or None))
        return
    url, key, model, stream, connections, seconds = sys.argv[2:8]
    print(json.dumps(uvloop.run(generate(url, key, model, stream == "stream", int(connections), float(seconds)))))


if __name__ == "__main__":
    main()
