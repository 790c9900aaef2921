"""The embedded engine over HTTP, as a plain ASGI application.

`POST /v1/chat/completions`, `GET /v1/models`, `POST /v1/load_lora_adapter`, `/v1/unload_lora_adapter` and
`GET /healthz`, in the shapes of OpenAI and of vLLM's adapter calls, so the router speaks to this engine and
to a vLLM server in the same way. It sits behind the router and authenticates nobody itself.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import orjson

from cluster.errors import DatasetError, NotFoundError, UnavailableError
from serve.engines.adapter_files import AdapterError
from serve.engines.generation import Update
from serve.engines.protocol import (
    ApiError,
    ChatRequest,
    Header,
    Json,
    logprobs_document,
    parse_chat,
    sampling_params,
    usage,
)
from serve.engines.tool_calls import parse_tool_calls

if TYPE_CHECKING:
    from serve.engines.local import LocalEngine

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
JSON = b"application/json"


class ClientGoneError(Exception):
    """The client disconnected before its request was whole."""


class EngineApi:
    """The ASGI callable around one engine."""

    def __init__(self, engine: "LocalEngine") -> None:
        self.engine = engine
        self._routes: dict[tuple[str, str], Callable[[Receive, Send], Awaitable[None]]] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/load_lora_adapter"): self._load,
            ("POST", "/v1/unload_lora_adapter"): self._unload,
            ("GET", "/healthz"): self._health,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            route = self._routes.get((scope["method"], path))
            if route is None:
                raise _no_route(scope["method"], path, {p for _, p in self._routes})
            await route(receive, send)
        except ApiError as error:
            await _send_json(send, error.status, error.body, error.headers)
        except ClientGoneError:
            log.debug("client left before its request was whole")

    async def _chat(self, receive: Receive, send: Send) -> None:
        request = parse_chat(await self._document(receive), self.engine.settings)
        answer = ChatAnswer(self.engine, request)
        await (answer.stream(receive, send) if request.stream else answer.whole(receive, send))

    async def _models(self, _receive: Receive, send: Send) -> None:
        data = [
            {
                "id": m.name,
                "object": "model",
                "created": m.loaded_at,
                "owned_by": "rayloop",
                "root": m.adapter_path,
            }
            for m in self.engine.models()
        ]
        await _send_json(send, 200, {"object": "list", "data": data})

    async def _load(self, receive: Receive, send: Send) -> None:
        document = await self._document(receive)
        name, path = _text(document, "lora_name"), _text(document, "lora_path")
        try:
            adapter = await asyncio.to_thread(self.engine.load_adapter, name, path)
        except AdapterError as error:
            raise ApiError(
                400, f"adapter {name!r}: {error}", param="lora_path", code="adapter_refused"
            ) from None
        body = {"status": "loaded", "lora_name": name, "sha256": adapter.sha256, "rank": adapter.rank}
        await _send_json(send, 200, body)

    async def _unload(self, receive: Receive, send: Send) -> None:
        name = _text(await self._document(receive), "lora_name")
        if not self.engine.unload_adapter(name):
            raise ApiError(404, f"no adapter {name!r} is loaded", param="lora_name", code="model_not_found")
        await _send_json(send, 200, {"status": "unloaded", "lora_name": name})

    async def _health(self, _receive: Receive, send: Send) -> None:
        scheduler = self.engine.scheduler
        status = "ok" if scheduler.alive else "dead"
        body = {
            "status": status,
            "running": scheduler.running,
            "queued": scheduler.queued,
            "models": len(self.engine.models()),
        }
        await _send_json(send, 200 if scheduler.alive else 503, body)

    async def _document(self, receive: Receive) -> Any:
        """The body as JSON."""
        limit, body, more = self.engine.settings.max_body_mb * 2**20, bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise ApiError(413, f"the body is larger than {limit:.0f} bytes", code="body_too_large")
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


class ChatAnswer:
    """One chat completion, whole or as a stream."""

    def __init__(self, engine: "LocalEngine", request: ChatRequest) -> None:
        self._engine, self._request = engine, request
        tools = request.tools if request.tool_choice != "none" else None
        self._tools = bool(tools)
        try:
            engine.adapter(request.model)
            prompt = engine.render(request.messages, tools)
        except NotFoundError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        except DatasetError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        self._params = sampling_params(
            request, len(prompt), engine.max_context_tokens, engine.settings.default_max_tokens
        )
        self._header = Header.of(request, f"chatcmpl-{uuid.uuid4().hex}", prompt)

    async def whole(self, receive: Receive, send: Send) -> None:
        """Answer in one piece; a client that leaves frees its rows."""
        generating = asyncio.ensure_future(self._collect())
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((generating, leaving), return_when=asyncio.FIRST_COMPLETED)
            if generating.done():
                await _send_json(send, 200, generating.result())
        finally:
            for task in (generating, leaving):
                task.cancel()
            await asyncio.gather(generating, leaving, return_exceptions=True)

    async def stream(self, receive: Receive, send: Send) -> None:
        """Answer in server-sent events; errors before the first token still have their status."""
        streaming = asyncio.ensure_future(self._send_chunks(send))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((streaming, leaving), return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
        finally:
            for task in (streaming, leaving):
                task.cancel()
            await asyncio.gather(streaming, leaving, return_exceptions=True)

    async def _updates(self, *, stream: bool) -> Any:
        choices = self._request.n or 1
        generator = self._engine.generate(
            self._request.model, self._header.prompt_ids, self._params, choices=choices, stream=stream
        )
        try:
            async for update in generator:
                if update.finish_reason == "error":
                    raise ApiError(
                        500, f"the engine failed: {update.error}", kind="server_error", code="engine_error"
                    )
                if update.finish_reason == "cancelled":
                    raise _unavailable(
                        "the engine is shutting down", self._engine.settings.retry_after_s, 503
                    )
                yield update
        except NotFoundError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        except UnavailableError as error:
            raise _unavailable(str(error), self._engine.settings.retry_after_s, 429) from None
        finally:
            await generator.aclose()

    async def _collect(self) -> Json:
        choices: list[Json] = [{}] * (self._request.n or 1)
        tokens = 0
        async for update in self._updates(stream=False):
            choices[update.generation.index] = self._choice(update)
            tokens += len(update.token_ids)
        document = self._header.document("chat.completion")
        document |= {"choices": choices, "usage": usage(len(self._header.prompt_ids), tokens)}
        if self._header.return_token_ids:
            document["prompt_token_ids"] = self._header.prompt_ids
        return document

    def _choice(self, update: Update) -> Json:
        text, calls = parse_tool_calls(update.text) if self._tools else (update.text, [])
        message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        choice: Json = {
            "index": update.generation.index,
            "message": message,
            "logprobs": self._logprobs(update),
            "finish_reason": "tool_calls" if calls else update.finish_reason,
        }
        if self._header.return_token_ids:
            choice["token_ids"] = update.token_ids
        return choice

    def _logprobs(self, update: Update) -> Json | None:
        if not self._params.logprobs:
            return None
        return logprobs_document(self._engine.texts, update.token_ids, update.logprobs)

    async def _send_chunks(self, send: Send) -> None:
        started, tokens = False, 0
        held: dict[int, str] = {}  # with tools, text waits for its end: a call is only known whole
        ids: dict[int, list[int]] = {}
        try:
            async for update in self._updates(stream=True):
                if not started:
                    await _start_stream(send)
                    started = True
                tokens += len(update.token_ids)
                index = update.generation.index
                await _send_events(send, [self._chunk(update, first=index not in ids, held=held)])
                ids.setdefault(index, []).extend(update.token_ids)
            await _send_events(send, self._last_chunks(ids, tokens), done=True)
        except ApiError as error:
            if not started:
                await _send_json(send, error.status, error.body, error.headers)
                return
            await _send_events(send, [error.body], done=True)

    def _chunk(self, update: Update, *, first: bool, held: dict[int, str]) -> Json:
        index = update.generation.index
        delta: Json = {"role": "assistant"} if first else {}
        reason: str | None = update.finish_reason
        if self._tools:
            held[index] = held.get(index, "") + update.text
            if reason is not None:
                delta["content"], calls = parse_tool_calls(held[index])
                if calls:
                    delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
                    reason = "tool_calls"
        else:
            delta["content"] = update.text
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(update), "finish_reason": reason}
        return self._header.document("chat.completion.chunk") | {"choices": [choice]}

    def _last_chunks(self, ids: dict[int, list[int]], tokens: int) -> list[Json]:
        """The chunk with usage and token ids, where either was asked for."""
        asked = self._request.stream_options is not None and self._request.stream_options.include_usage
        if not asked and not self._header.return_token_ids:
            return []
        last = self._header.document("chat.completion.chunk")
        last |= {"choices": [], "usage": usage(len(self._header.prompt_ids), tokens)}
        if self._header.return_token_ids:
            last["prompt_token_ids"] = self._header.prompt_ids
            empty = {"delta": {}, "logprobs": None, "finish_reason": None}
            last["choices"] = [{"index": index, **empty, "token_ids": ids[index]} for index in sorted(ids)]
        return [last]


def _text(document: Any, field: str) -> str:
    value = document.get(field) if isinstance(document, dict) else None
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{field} must be a text that is not empty", param=field, code="invalid_value")
    return value


def _unavailable(message: str, retry_after_s: float, status: int) -> ApiError:
    headers = {
        "retry-after": str(max(1, round(retry_after_s))),
        "retry-after-ms": str(round(retry_after_s * 1000)),
    }
    kind = "rate_limit_error" if status == 429 else "server_error"
    return ApiError(
        status,
        message,
        kind=kind,
        code="engine_overloaded" if status == 429 else "engine_stopped",
        headers=headers,
    )


def _no_route(method: str, path: str, known: set[str]) -> ApiError:
    if path in known:
        return ApiError(405, f"{path} does not answer {method}", code="method_not_allowed")
    return ApiError(404, f"there is no {path} here; known are {', '.join(sorted(known))}", code="not_found")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(send: Send, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
    data = orjson.dumps(body)
    names = [(b"content-type", JSON), (b"content-length", str(len(data)).encode())]
    names += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": names})
    await send({"type": "http.response.body", "body": data})


async def _start_stream(send: Send) -> None:
    names = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": names})


async def _send_events(send: Send, documents: list[Json], *, done: bool = False) -> None:
    data = b"".join(b"data: " + orjson.dumps(document) + b"\n\n" for document in documents)
    if done:
        data += b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": not done})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return
