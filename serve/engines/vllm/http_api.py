"""The HTTP side of the vLLM engine: requests pass to the child, names and errors are checked on the way.

The bytes of an answer pass as they come. What is looked at: the model's name, which must be loaded; the
limits that the embedded engine has too; and an error's shape, which vLLM has one of its own for.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from cluster.errors import NotFoundError
from serve.asgi import send_json
from serve.engines.engine_routes import STREAM_HEADERS, EngineRoutes, until_disconnect
from serve.engines.vllm.engine import VllmEngine
from serve.engines.vllm.process import IDLE_S
from serve.openai import JSON, ApiError, Receive, Scope, Send, from_engine, send_response, unknown_model

log = logging.getLogger(__name__)

Json = dict[str, Any]

LIMITED = {"n": "max_choices", "top_logprobs": "max_top_logprobs"}
"""Fields of a request, and the settings that bound them."""
REFUSED = ("prompt_logprobs", "echo", "logprob_token_ids")
"""The first two end vLLM's engine where another answer is sampled in the same step; the third takes the log-probs of
the answers beside it."""
TOO_LONG = ("maximum context length", "max_model_len", "longer than the maximum model length")
STREAMED_ERROR = b'data: {"error"'


class VllmApi(EngineRoutes):
    """The ASGI callable around a `VllmEngine`."""

    def __init__(self, engine: VllmEngine, token: str | None = None) -> None:
        super().__init__(engine, token)
        self.engine = engine
        self.in_flight = 0
        self._session: aiohttp.ClientSession | None = None
        self._routes |= {
            ("POST", "/v1/chat/completions"): self._generate,
            ("POST", "/v1/completions"): self._generate,
        }

    async def _health(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        alive = await asyncio.to_thread(lambda: self.engine.alive)
        models = len(self.engine.models())
        body = {"status": "ok" if alive else "dead", "running": self.in_flight, "models": models}
        await send_json(send, body, 200 if alive else 503)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The connections to vLLM."""
        yield
        if self._session is not None:
            await self._session.close()

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self.engine.settings
        document = await self._document(scope, receive)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        body = orjson.dumps(self._checked(document))
        if self.in_flight >= settings.max_rows + settings.max_queued:
            message = f"{self.in_flight} answers are being made already; try again later"
            raise ApiError(429, message, code="engine_overloaded", retry_after_s=settings.retry_after_s)
        self.in_flight += 1
        try:
            with self.engine.using(document["model"]):
                await self._until_gone(self._pass(path, body, send), receive)
        except NotFoundError:
            raise unknown_model(document["model"], (m.name for m in self.engine.models())) from None
        finally:
            self.in_flight -= 1

    def _checked(self, document: Json) -> Json:
        """The request as vLLM gets it.

        Raises:
            ApiError: 400 with the name of the first wrong field.
        """
        if not isinstance(document.get("model"), str):
            raise ApiError(400, "model must be a text", param="model", code="invalid_value")
        refused = next((param for param in REFUSED if _is_set(document.get(param))), None)
        if refused is not None:
            message = f"{refused} is not supported: it would harm other answers; leave it out"
            raise ApiError(400, message, param=refused, code="unsupported_parameter")
        for param, setting in LIMITED.items():
            value, limit = document.get(param), getattr(self.engine.settings, setting)
            if isinstance(value, int) and value > limit:
                raise ApiError(400, f"{param}={value} must be at most {limit}", param=param, code="invalid_value")
        added: Json = {}
        if document.get("max_tokens") is None and document.get("max_completion_tokens") is None:
            added["max_tokens"] = self.engine.settings.default_max_tokens
        if document.get("tool_choice") == "required" and document.get("parallel_tool_calls") is None:
            added["parallel_tool_calls"] = False  # else a list without an end, of which a small model reaches none
        return document | added

    async def _until_gone(self, answering: Any, receive: Receive) -> None:
        """Answer, unless the client leaves first: then vLLM hears of it and frees the rows."""
        answer, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            for task in (answer, leaving):
                task.cancel()
            await asyncio.gather(answer, leaving, return_exceptions=True)

    async def _pass(self, path: str, body: bytes, send: Send) -> None:
        try:
            async with self._connections().post(f"http://vllm{path}", data=body) as reply:
                if reply.status != 200:
                    raise _shaped(reply.status, await reply.read())
                if reply.content_type == "text/event-stream":
                    await self._pass_stream(reply.content, send)
                else:
                    await send_response(send, 200, await reply.read(), [JSON])
        except (aiohttp.ClientError, OSError) as error:
            log.warning("vLLM does not answer: %s", error or type(error).__name__)
            retry_after_s = self.engine.settings.retry_after_s
            raise ApiError(503, "The engine is down.", code="engine_stopped", retry_after_s=retry_after_s) from None

    async def _pass_stream(self, content: aiohttp.StreamReader, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            async for piece in content.iter_any():
                data = _shaped_event(piece) if piece.startswith(STREAMED_ERROR) else piece
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except (aiohttp.ClientError, OSError) as error:
            log.warning("vLLM broke off a stream: %s", error or type(error).__name__)
            broken = ApiError(503, "The engine went down.", code="engine_stopped")
            data = b"data: " + broken.body() + b"\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self.engine.process.socket), limit=0, keepalive_timeout=IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"content-type": "application/json"},
                read_bufsize=2**20,
            )
        return self._session


def _is_set(value: Any) -> bool:
    """Whether a field asks for something: 0 log-probs of alternatives are log-probs all the same."""
    return value is not None and value is not False


def _shaped(status: int, body: bytes) -> ApiError:
    """vLLM's error in OpenAI's shape, with the code that clients look for."""
    error = from_engine(status, body)
    if status == 400 and any(words in error.message for words in TOO_LONG):
        error.code, error.param = "context_length_exceeded", "messages"
    elif status == 400 and error.code is None:
        error.code = "invalid_value"
    elif status >= 500:
        error.code, error.type = "engine_error", "server_error"
    return error


def _shaped_event(piece: bytes) -> bytes:
    """An error in the middle of a stream."""
    line, _, rest = piece.partition(b"\n\n")
    try:
        found = orjson.loads(line.removeprefix(b"data: "))["error"]
        status = found.get("code") if isinstance(found.get("code"), int) else 500
    except (orjson.JSONDecodeError, KeyError, AttributeError):
        return piece
    return b"data: " + _shaped(status, orjson.dumps({"error": found})).body() + b"\n\n" + rest
