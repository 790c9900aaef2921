"""One chat completion: who answers, the answer itself, and the record of it.

`ChatHandler.handle` reads top to bottom: parse, plan, try the assigned version, fall back to stable where
the candidate fails before its first byte, pass the answer on, leave a record.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import orjson

from cluster import metrics
from cluster.settings.serving import EngineEndpoint, ServeSettings
from data.feedback import pseudonym
from serve.applications.document import is_ours
from serve.arms import Plan, not_served, plan
from serve.breaker import Breaker, StableLatency
from serve.capture import GONE, Capture, Record
from serve.keys import Key
from serve.openai import (
    JSON,
    ApiError,
    Headers,
    Receive,
    Scope,
    Send,
    from_engine,
    parse_object,
    read_body,
    send_response,
    shown,
    text_header,
)
from serve.proxy import Limits, Reply, Upstream, UpstreamError
from serve.rewrite import DONE, Rewriter, Wanted, error_event
from serve.snapshot import Snapshot, Target

log = logging.getLogger(__name__)

PATH = "/v1/chat/completions"
EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
MODALITY_CHARACTERS, TIER_CHARACTERS = 16, 64
PSEUDONYMS_KEPT = 50_000
"""A keyed hash lets go of the interpreter's lock and then waits for other threads to give it back: 90 us."""


@dataclass(frozen=True, slots=True)
class View:
    """What one request is decided by."""

    snapshot: Snapshot
    endpoints: Mapping[str, EngineEndpoint]


@dataclass(slots=True)
class Engines:
    """The upstreams of one router by engine name, made when first needed."""

    settings: ServeSettings
    default_url: str
    environment: Mapping[str, str]
    engine_token: str | None = None
    """What the engine of this installation asks for."""
    _open: dict[str, tuple[EngineEndpoint, Upstream]] = field(default_factory=dict)

    def upstream(self, name: str, endpoint: EngineEndpoint) -> Upstream:
        """The connections to an engine; new ones when its address was changed."""
        known = self._open.get(name)
        if known is not None and known[0] == endpoint:
            return known[1]
        settings = self.settings
        limits = Limits(
            settings.connect_timeout_s,
            settings.request_timeout_s,
            settings.upstream_connections,
            settings.max_response_bytes,
        )
        key = self.environment.get(endpoint.api_key_env) if endpoint.api_key_env else None
        if endpoint.base_url is None:
            key = key or self.engine_token
        made = Upstream(endpoint.base_url or self._application_url(name), limits, key)
        if known is not None:
            known[1].close()
        self._open[name] = (endpoint, made)
        return made

    def _application_url(self, name: str) -> str:
        """The application `engine`, or the one of that name beside it (`serve.applications`)."""
        return f"{self.default_url.removesuffix('/engine')}/{name}" if is_ours(name) else self.default_url

    def close(self) -> None:
        """Drop every connection."""
        for _, upstream in self._open.values():
            upstream.close()


@dataclass(slots=True)
class Exchange:
    """One request on its way through: what it asks, the plan for it, and the record it will leave."""

    request: dict[str, Any]
    record: Record
    stream: bool
    began: float
    request_id: str
    endpoints: Mapping[str, EngineEndpoint]
    capture: bool
    served: Target | None = None
    reply: Reply | None = None
    head: bytes = b""
    """First piece of the answer, which shows that the engine works."""

    @property
    def plan(self) -> Plan:
        """Who should answer."""
        return self.record.plan

    def body_for(self, target: Target) -> bytes:
        """The request as that engine gets it."""
        sent = self.request | {"model": target.model_name}
        if self.capture and self.endpoints[target.engine].token_ids:
            sent |= {"return_token_ids": True, "logprobs": True}
        try:
            return orjson.dumps(sent)
        except TypeError:
            raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None

    def rewriter(self, target: Target) -> Rewriter:
        """Turns that engine's answer into ours."""
        return Rewriter(self.record.interaction_id, target.version, Wanted.by(self.request), self.record.answer)

    def headers(self) -> Headers:
        """Who served, in headers."""
        record, plan = self.record, self.record.plan
        headers: Headers = [
            (b"x-rayloop-interaction", record.interaction_id.encode()),
            (b"x-rayloop-arm", plan.arm.encode()),
        ]
        if self.served is not None:
            headers.append((b"x-rayloop-version", self.served.version.encode()))
            if self.served.digest:
                headers.append((b"x-rayloop-digest", self.served.digest.encode()))
        if plan.experiment_id:
            headers.append((b"x-rayloop-experiment", plan.experiment_id.encode()))
        return headers


class ChatHandler:
    """Chat completions of one router replica; its state is breakers, latencies and open connections."""

    def __init__(self, settings: ServeSettings, engines: Engines, capture: Capture | None, secret: bytes) -> None:
        self._settings, self._engines, self._capture = settings, engines, capture
        self._pseudonym = lru_cache(PSEUDONYMS_KEPT)(partial(pseudonym, secret))
        self._breakers: dict[str, Breaker] = {}
        self._stable_latency: dict[tuple[str, bool], StableLatency] = {}

    async def handle(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        key: Key,
        view: View,
        request_id: str,
        headers: Headers,
    ) -> int:
        """Answer one request; returns the status sent. `headers` go with every answer."""
        body = await read_body(scope, receive, self._settings.max_body_bytes, self._settings.body_timeout_s)
        exchange = self._exchange(scope, body, key, view, request_id)
        try:
            async with _in_flight():
                await self._obtain(exchange)
                return await self._deliver(exchange, send, headers)
        except ApiError as error:
            exchange.record.error = error.code or str(error.status)
            raise
        except (asyncio.CancelledError, OSError):
            self._client_left(exchange)
            raise
        finally:
            if exchange.reply is not None:
                exchange.reply.abort()
            self._finish(exchange)

    def close(self) -> None:
        """Drop the connections to the engines; from the event loop."""
        self._engines.close()

    def breaker_states(self) -> dict[str, bool]:
        """Version -> True while it is left alone."""
        return {version: breaker.is_open for version, breaker in self._breakers.items()}

    def _exchange(self, scope: Scope, body: bytes, key: Key, view: View, request_id: str) -> Exchange:
        began = time.perf_counter()
        request = parse_chat(body)
        raw_user = request.get("user") or text_header(scope, b"x-rayloop-user")
        user = self._pseudonym(key.tenant, raw_user) if raw_user else None
        session = text_header(scope, b"x-rayloop-session", 128)
        modality = text_header(scope, b"x-rayloop-modality", MODALITY_CHARACTERS) or "text"
        interaction_id = new_interaction_id()
        planned = plan(
            view.snapshot,
            key.tenant,
            request["model"],
            modality=modality,
            user=user,
            session=session,
            request=interaction_id,
        )
        tier = text_header(scope, b"x-rayloop-user-tier", TIER_CHARACTERS)
        record = Record(interaction_id, key, planned, request, modality, user, session, _trace_id(scope), tier)
        stream = bool(request.get("stream"))
        return Exchange(request, record, stream, began, request_id, view.endpoints, self._capture is not None)

    # obtaining an answer

    async def _obtain(self, exchange: Exchange) -> None:
        """The head of an answer: from the version assigned, else from stable."""
        if exchange.plan.fallback is None:
            await self._ask_stable(exchange, exchange.plan.target, exchange.plan.version)
            return
        try:
            await self._ask_candidate(exchange)
        except UpstreamError as error:
            self._count_fallback(exchange, error)
            await self._ask_stable(exchange, exchange.plan.fallback, exchange.plan.fallback.version)

    async def _ask_stable(self, exchange: Exchange, target: Target | None, version: str) -> None:
        if target is None:
            raise not_served(version)
        latency = self._latency(exchange)
        try:
            await self._ask(exchange, target)
        except UpstreamError as error:
            exchange.record.timeout = error.code == "engine_timeout"
            raise ApiError(
                error.status, error.message, code=error.code, retry_after_s=self._settings.retry_after_s
            ) from None
        if exchange.plan.arm != "none" and exchange.record.fallback is None and exchange.record.ttft_s is not None:
            latency.record(exchange.record.ttft_s)

    async def _ask_candidate(self, exchange: Exchange) -> None:
        """Ask the candidate within its budget.

        Raises:
            UpstreamError: it failed, was too slow, or is being left alone.
        """
        version, target = exchange.plan.version, exchange.plan.target
        breaker = self._breakers.setdefault(version, Breaker(self._settings.breaker))
        if not breaker.allow(time.monotonic()):
            raise UpstreamError("its breaker is open", code="breaker_open")
        try:
            if target is None:
                raise UpstreamError("no engine holds it", code="version_not_ready")
            async with asyncio.timeout(self._latency(exchange).budget_s()):
                await self._ask(exchange, target)
        except (UpstreamError, TimeoutError) as error:
            breaker.record(False, time.monotonic())
            if isinstance(error, TimeoutError):
                raise UpstreamError("it was slower than its budget", code="engine_timeout") from None
            raise
        except BaseException:  # a request the engine rightly refuses, or a client that left, tells nothing
            breaker.forget()
            raise
        else:
            breaker.record(True, time.monotonic())
        finally:
            metrics.BREAKER_OPEN.labels(version).set(breaker.is_open)

    async def _ask(self, exchange: Exchange, target: Target) -> None:
        """Send the request and wait for the first piece of a good answer.

        Raises:
            UpstreamError: the engine failed.
            ApiError: the engine refused the request (4xx), in OpenAI's shape.
        """
        endpoint = exchange.endpoints.get(target.engine)
        if endpoint is None:
            raise UpstreamError(f"engine {target.engine} is not configured", code="engine_unavailable", status=503)
        upstream = self._engines.upstream(target.engine, endpoint)
        reply = await upstream.post(PATH, exchange.body_for(target), request_id=exchange.request_id)
        try:
            if reply.status != 200:
                raise _failure(reply, await reply.read(), target, exchange.plan.fallback, self._settings.retry_after_s)
            exchange.head = await reply.next() if exchange.stream else await reply.read()
            if not exchange.head:
                raise UpstreamError("the engine's answer was empty", code="engine_error")
        except BaseException:
            reply.abort()
            raise
        exchange.reply, exchange.served = reply, target
        exchange.record.served_version, exchange.record.adapter_digest = target.version, target.digest
        exchange.record.ttft_s = time.perf_counter() - exchange.began

    def _latency(self, exchange: Exchange) -> StableLatency:
        """A stream's first byte is its first token, a whole answer's is its end: kept apart."""
        route = (exchange.plan.agent, exchange.stream)
        if route not in self._stable_latency:
            self._stable_latency[route] = StableLatency(self._settings.fallback)
        return self._stable_latency[route]

    def _count_fallback(self, exchange: Exchange, error: UpstreamError) -> None:
        exchange.record.fallback = error.code
        exchange.record.timeout = error.code == "engine_timeout"
        metrics.FALLBACKS.labels(exchange.plan.agent, error.code).inc()
        log.info("candidate %s: %s; stable answers", exchange.plan.version, error.message)

    # delivering it

    async def _deliver(self, exchange: Exchange, send: Send, headers: Headers) -> int:
        assert exchange.served is not None
        rewriter = exchange.rewriter(exchange.served)
        if exchange.stream:
            await self._stream(exchange, rewriter, send, headers)
            return 200
        try:
            body = rewriter.whole(exchange.head)
        except (ValueError, KeyError, TypeError):
            raise ApiError(502, "The engine's answer is not a completion.", code="engine_error") from None
        await send_response(send, 200, body, [JSON, *exchange.headers(), *headers])
        return 200

    async def _stream(self, exchange: Exchange, rewriter: Rewriter, send: Send, headers: Headers) -> None:
        assert exchange.reply is not None
        head = [*EVENT_STREAM, *exchange.headers(), *headers]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        try:
            piece = rewriter.feed(exchange.head)
            while True:
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                if not (more := await exchange.reply.next()):
                    break
                piece = rewriter.feed(more)
            tail = rewriter.end()
        except UpstreamError as error:
            rewriter.error = error.code
            tail = error_event(ApiError(error.status, error.message, code=error.code)) + DONE
        exchange.record.error = rewriter.error
        await send({"type": "http.response.body", "body": tail})

    # the record

    def _client_left(self, exchange: Exchange) -> None:
        exchange.record.disconnected = True
        metrics.DISCONNECTS.labels(exchange.plan.agent).inc()

    def _finish(self, exchange: Exchange) -> None:
        record = exchange.record
        record.latency_s = time.perf_counter() - exchange.began
        labels = (record.plan.agent, record.plan.arm)
        metrics.LATENCY.labels(*labels).observe(record.latency_s)
        if record.ttft_s is not None:
            metrics.FIRST_TOKEN.labels(*labels).observe(record.ttft_s)
        if record.disconnected and record.error is None:
            record.error = GONE if record.served_version is None else None
        if self._capture is not None:
            self._capture.offer(record)


def new_interaction_id() -> str:
    """A completion id that sorts by time, as UUIDv7 does; needs to be unique, not secret."""
    return f"chatcmpl-{time.time_ns() // 1_000_000:012x}{random.getrandbits(80):020x}"


def parse_chat(body: bytes) -> dict[str, Any]:
    """The request in a body; only what we decide by is looked at, the rest passes through.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    request = parse_object(body)
    model, messages = request.get("model"), request.get("messages")
    if not isinstance(model, str) or not model:
        raise _wrong("model", model, "must name an agent or a version")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise _wrong("messages", messages, "must be a list of at least one message")
    if not isinstance(request.get("stream"), bool | None):
        raise _wrong("stream", request["stream"], "must be true or false")
    user = request.get("user")
    if user is not None and (not isinstance(user, str) or len(user) > 256):
        raise _wrong("user", user, "must be a text of at most 256 characters")
    return request


def _wrong(name: str, value: Any, rule: str) -> ApiError:
    return ApiError(400, f"{name}={shown(value)} {rule}.", code="invalid_value", param=name)


def _failure(reply: Reply, body: bytes, target: Target, fallback: Target | None, retry_after_s: float) -> Exception:
    """An engine's refusal: its own fault (then somebody else may answer) or the request's."""
    error = from_engine(reply.status, body)
    elsewhere = fallback is not None and fallback.engine != target.engine
    if reply.status >= 500 or reply.status in (401, 403, 404, 408) or (reply.status == 429 and elsewhere):
        status = 503 if reply.status == 503 else 504 if reply.status == 504 else 502
        return UpstreamError(
            f"engine {target.engine}: {error.message}", code=error.code or "engine_error", status=status
        )
    if reply.status == 429:
        after = reply.headers.get(b"retry-after", b"")
        error.retry_after_s = float(after) if after.isdigit() else retry_after_s
    return error


@asynccontextmanager
async def _in_flight() -> AsyncIterator[None]:
    metrics.IN_FLIGHT.inc()
    try:
        yield
    finally:
        metrics.IN_FLIGHT.dec()


def _trace_id(scope: Scope) -> str | None:
    parts = (text_header(scope, b"traceparent") or "").split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else None
