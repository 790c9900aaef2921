"""A tiny OpenAI-compatible engine for the router's tests: answers at once, from a script by model name.

Each model name may be told to fail, be slow or stream slowly. It counts what it was asked and whether a
stream was cut off, and speaks token ids and log-probabilities the way our engines do.
"""

import asyncio
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvicorn

TEXT = ["It", " is", " a", " false", " alarm"]


@dataclass
class Behaviour:
    """What one model does."""

    status: int = 200
    delay_s: float = 0.0
    """Before the first byte; a client that leaves ends it."""
    gap_s: float = 0.0
    """Between the pieces of a stream."""
    paused: bool = False
    """After each piece of a stream, wait until this is false."""
    break_after: int | None = None
    """Drop the connection after so many pieces."""
    error: Any = None
    """Body of an error answer; a default in nobody's shape otherwise."""
    finish_reason: str = "stop"
    raw: bytes | None = None
    """The body of a 200, whatever it is."""
    raw_pieces: list[bytes] | None = None
    """The pieces of a 200, each sent by itself."""
    text: str | None = None
    """Says this instead of the usual."""
    tool_calls: list[dict[str, Any]] | None = None
    """Calls these instead of saying anything."""


@dataclass
class Engine:
    """The ASGI application and what it has seen."""

    behaviours: dict[str, Behaviour] = field(default_factory=lambda: defaultdict(Behaviour))
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    cut_off: int = 0
    url: str = ""
    """Where it listens, once it does."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        request = orjson.loads(body)
        self.requests.append(request)
        self.paths.append(scope["path"])
        behaviour = self.behaviours[request["model"]]
        if behaviour.delay_s and await _has_left(receive, behaviour.delay_s):
            return
        if behaviour.status != 200:
            document = behaviour.error or {"object": "error", "message": "it broke", "code": behaviour.status}
            await _respond(send, behaviour.status, orjson.dumps(document))
        elif behaviour.raw is not None:
            await _respond(send, 200, behaviour.raw)
        elif behaviour.raw_pieces is not None:
            await _respond_in_pieces(send, behaviour.raw_pieces)
        elif request.get("stream"):
            await self._stream(request, behaviour, receive, send)
        else:
            await _respond(send, 200, orjson.dumps(_whole(request, behaviour)))

    async def _stream(self, request: dict[str, Any], behaviour: Behaviour, receive: Any, send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        gone = asyncio.ensure_future(receive())
        words = TEXT if behaviour.text is None else [behaviour.text]
        for number, word in enumerate(words):
            if behaviour.break_after == number:
                raise RuntimeError("scripted break")
            await send(
                {
                    "type": "http.response.body",
                    "body": _event(_chunk(request, number, word)),
                    "more_body": True,
                }
            )
            await asyncio.wait([gone], timeout=behaviour.gap_s)
            while behaviour.paused and not gone.done():
                await asyncio.wait([gone], timeout=0.02)
            if gone.done():
                self.cut_off += 1
                return
        last = _last_chunk(request)
        await send({"type": "http.response.body", "body": _event(last) + b"data: [DONE]\n\n"})
        gone.cancel()


async def _has_left(receive: Any, within_s: float) -> bool:
    gone = asyncio.ensure_future(receive())
    await asyncio.wait([gone], timeout=within_s)
    gone.cancel()
    return gone.done() and not gone.cancelled()


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def _logprobs(request: dict[str, Any], words: list[str]) -> dict[str, Any] | None:
    return {"content": [{"token": w, "logprob": -0.5} for w in words]} if request.get("logprobs") else None


def _whole(request: dict[str, Any], behaviour: Behaviour) -> dict[str, Any]:
    text = "".join(TEXT) if behaviour.text is None else behaviour.text
    if "prompt" in request:
        return _text_whole(request, text)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if behaviour.tool_calls is not None:
        message = {"role": "assistant", "content": None, "tool_calls": behaviour.tool_calls}
    choice: dict[str, Any] = {
        "index": 0, "message": message, "finish_reason": behaviour.finish_reason, "logprobs": _logprobs(request, TEXT),
    }  # fmt: skip
    document = {
        "id": "engine-1", "object": "chat.completion", "created": 1, "model": request["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }  # fmt: skip
    if request.get("return_token_ids"):
        document["prompt_token_ids"] = [1, 2, 3]
        choice["token_ids"] = [10, 11, 12, 13, 14]
    return document


def _text_logprobs(request: dict[str, Any], words: list[str]) -> dict[str, Any] | None:
    if request.get("logprobs") is None:
        return None
    return {"tokens": words, "token_logprobs": [-0.5] * len(words), "top_logprobs": None, "text_offset": []}


def _text_whole(request: dict[str, Any], text: str) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0, "text": text, "finish_reason": "stop", "logprobs": _text_logprobs(request, TEXT),
    }  # fmt: skip
    if request.get("return_token_ids"):
        choice |= {"prompt_token_ids": [1, 2, 3], "token_ids": [10, 11, 12, 13, 14]}
    return {
        "id": "engine-1", "object": "text_completion", "created": 1, "model": request["model"], "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }  # fmt: skip


def _chunk(request: dict[str, Any], number: int, word: str) -> dict[str, Any]:
    if "prompt" in request:
        text = {"index": 0, "text": word, "finish_reason": None, "logprobs": _text_logprobs(request, [word])}
        return {
            "id": "engine-1",
            "object": "text_completion",
            "created": 1,
            "model": request["model"],
            "choices": [text],
        }
    delta = {"content": word} | ({"role": "assistant"} if number == 0 else {})
    choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": _logprobs(request, [word])}
    return {
        "id": "engine-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": request["model"],
        "choices": [choice],
    }


def _last_chunk(request: dict[str, Any]) -> dict[str, Any]:
    document = _chunk(request, 1, "")
    said = {"text": ""} if "prompt" in request else {"delta": {}}
    document["choices"][0] |= said | {"finish_reason": "stop", "logprobs": None}
    document["usage"] = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    if request.get("return_token_ids"):
        document["prompt_token_ids"] = [1, 2, 3]
        document["choices"][0]["token_ids"] = [10, 11, 12, 13, 14]
    return document


async def _respond(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _respond_in_pieces(send: Any, pieces: list[bytes]) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0.02)
    await send({"type": "http.response.body", "body": b""})


class _Uvicorn(uvicorn.Server):
    """uvicorn's server looks ten times a second whether it is to end; this one is told, and waits for nothing else."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def tell(self) -> None:
        """End, once the requests under way have their answers; from any thread."""
        self._loop.call_soon_threadsafe(self._told.set)

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._told.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while self.server_state.connections or self.server_state.tasks:
                    await asyncio.sleep(0.002)
                for server in self.servers:
                    await server.wait_closed()
        except TimeoutError:
            for task in self.server_state.tasks:
                task.cancel()
        await self.lifespan.shutdown()


class Server:
    """An ASGI application on a free loopback port, in a thread."""

    def __init__(self, app: Any, lifespan: str = "off", *, drain_s: int = 1) -> None:
        config = uvicorn.Config(
            app, port=0, log_level="error", lifespan=lifespan,  # type: ignore[arg-type]
            timeout_graceful_shutdown=drain_s,
            timeout_keep_alive=60,  # tests' clients keep theirs for 5 s, as uvicorn would
        )  # fmt: skip
        self._server = _Uvicorn(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._ending = False

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            self._thread.join(0.002)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        """Take no more connections, and end once those that are open have ended."""
        if not self._ending:
            self._ending = True
            self._server.tell()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(timeout=10)
