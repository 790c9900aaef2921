"""`/v1/chat/completions` of the embedded engine: one answer, whole or as server-sent events."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import orjson

from cluster.errors import DatasetError, InputError, NotFoundError, UnavailableError
from serve.asgi import send_json
from serve.engines.engine_routes import STREAM_HEADERS, until_disconnect
from serve.engines.generation import SamplingParams, Update
from serve.engines.protocol import (
    ChatRequest,
    Header,
    Json,
    check_bias,
    logprobs_document,
    sampling_params,
    usage,
)
from serve.engines.tool_calls import parse_tool_calls
from serve.openai import ApiError, Receive, Send, unknown_model

if TYPE_CHECKING:
    from serve.engines.local import LocalEngine


class ChatAnswer:
    """One chat completion, whole or as a stream."""

    object_names = ("chat.completion", "chat.completion.chunk")
    """Of a whole answer and of a piece of one."""

    def __init__(self, engine: "LocalEngine", request: ChatRequest) -> None:
        self._engine, self.request = engine, request
        forbidden = request.tool_choice is not None and request.tool_choice.type == "none"
        tools = None if forbidden else request.tools
        self._tools = bool(tools)
        try:
            engine.adapter(request.model)
            prompt = engine.render(request.messages, tools)
        except NotFoundError:
            raise unknown_model(request.model, (m.name for m in engine.models())) from None
        except DatasetError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        self._params = sampling_params(
            request, len(prompt), engine.max_context_tokens, engine.settings.default_max_tokens
        )
        check_bias(request, len(engine.tokenizer))
        _check_grammar(engine, self._params)
        self._header = Header.of(request, f"chatcmpl-{uuid.uuid4().hex}", engine.fingerprint, prompt)

    async def answer(self, receive: Receive, send: Send) -> None:
        """Answer as the request wants it."""
        await (self.stream(receive, send) if self.request.stream else self.whole(receive, send))

    async def whole(self, receive: Receive, send: Send) -> None:
        """Answer in one piece; a client that leaves frees its rows."""
        generating = asyncio.ensure_future(self._collect())
        leaving = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait((generating, leaving), return_when=asyncio.FIRST_COMPLETED)
            if generating.done():
                await send_json(send, generating.result())
        finally:
            for task in (generating, leaving):
                task.cancel()
            await asyncio.gather(generating, leaving, return_exceptions=True)

    async def stream(self, receive: Receive, send: Send) -> None:
        """Answer in server-sent events; errors before the first token still have their status."""
        streaming = asyncio.ensure_future(self._send_chunks(send))
        leaving = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait((streaming, leaving), return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
        finally:
            for task in (streaming, leaving):
                task.cancel()
            await asyncio.gather(streaming, leaving, return_exceptions=True)

    async def _updates(self, *, stream: bool) -> AsyncGenerator[Update]:
        """The engine's updates, its troubles as answers to the client."""
        retry_after_s = self._engine.settings.retry_after_s
        generator = self._engine.generate(
            self.request.model,
            self._header.prompt_ids,
            self._params,
            choices=self.request.n or 1,
            stream=stream,
        )
        try:
            async with aclosing(generator):
                async for update in generator:
                    if update.finish_reason == "error":
                        raise ApiError(500, f"The engine failed: {update.error}.", code="engine_error")
                    if update.finish_reason == "cancelled":
                        message = "The engine is shutting down."
                        raise ApiError(503, message, code="engine_stopped", retry_after_s=retry_after_s)
                    yield update
        except NotFoundError:  # unloaded since the request was parsed
            raise unknown_model(self.request.model, (m.name for m in self._engine.models())) from None
        except UnavailableError as error:
            raise ApiError(429, str(error), code="engine_overloaded", retry_after_s=retry_after_s) from None

    async def _collect(self) -> Json:
        choices: list[Json] = [{}] * (self.request.n or 1)
        tokens = 0
        async with aclosing(self._updates(stream=False)) as updates:
            async for update in updates:
                choices[update.generation.index] = self._choice(update)
                tokens += len(update.token_ids)
        document = self._header.document(self.object_names[0])
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
            "finish_reason": self._reason(update.finish_reason, calls),
        }
        if self._header.return_token_ids:
            choice["token_ids"] = update.token_ids
        return choice

    def _reason(self, ended: str | None, calls: list[Json]) -> str | None:
        """OpenAI's: an answer with calls ends for them, unless the request named the one it wanted."""
        named = self.request.tool_choice is not None and self.request.tool_choice.type == "function"
        return "tool_calls" if calls and not named else ended

    def _logprobs(self, update: Update) -> Json | None:
        if not self._params.logprobs:
            return None
        return logprobs_document(self._engine.texts, update.token_ids, update.logprobs)

    async def _send_chunks(self, send: Send) -> None:
        started, tokens = False, 0
        held: dict[int, str] = {}  # with tools, text waits for its end: a call is only known whole
        ids: dict[int, list[int]] = {}
        try:
            async with aclosing(self._updates(stream=True)) as updates:
                async for update in updates:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                        started = True
                    tokens += len(update.token_ids)
                    index = update.generation.index
                    piece = self._piece(update, first=index not in ids, held=held)
                    await _send_events(send, [self._header.document(self.object_names[1]) | {"choices": [piece]}])
                    ids.setdefault(index, []).extend(update.token_ids)
            await _send_events(send, self._last_chunks(ids, tokens), done=True)
        except ApiError as error:
            if not started:
                raise
            await _send_events(send, [{"error": error.object()}], done=True)

    def _piece(self, update: Update, *, first: bool, held: dict[int, str]) -> Json:
        index = update.generation.index
        delta: Json = {"role": "assistant", "content": ""} if first else {}
        reason: str | None = update.finish_reason
        if self._tools:
            held[index] = held.get(index, "") + update.text
            if reason is not None:
                text, calls = parse_tool_calls(held[index])
                if text or not calls:
                    delta["content"] = text
                if calls:
                    delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
                reason = self._reason(reason, calls)
        else:
            delta["content"] = update.text
        return {"index": index, "delta": delta, "logprobs": self._logprobs(update), "finish_reason": reason}

    def _empty_piece(self) -> Json:
        return {"delta": {}, "logprobs": None, "finish_reason": None}

    def _last_chunks(self, ids: dict[int, list[int]], tokens: int) -> list[Json]:
        """The chunk with usage and token ids, where either was asked for."""
        asked = self.request.stream_options is not None and self.request.stream_options.include_usage
        if not asked and not self._header.return_token_ids:
            return []
        last = self._header.document(self.object_names[1])
        last |= {"choices": [], "usage": usage(len(self._header.prompt_ids), tokens)}
        if self._header.return_token_ids:
            last["prompt_token_ids"] = self._header.prompt_ids
            empty = self._empty_piece()
            last["choices"] = [{"index": index, **empty, "token_ids": ids[index]} for index in sorted(ids)]
        return [last]


def _check_grammar(engine: "LocalEngine", params: SamplingParams) -> None:
    try:
        engine.grammars.constraint(params)
    except InputError as error:
        raise ApiError(400, str(error), param=error.field, code="invalid_value") from None


async def _send_events(send: Send, documents: list[Json], *, done: bool = False) -> None:
    data = b"".join(b"data: " + orjson.dumps(document) + b"\n\n" for document in documents)
    if done:
        data += b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": not done})
