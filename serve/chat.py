"""One completion: who answers, the answer itself, and the record of it.

`CompletionHandler.handle` reads top to bottom: parse, plan, try the assigned version, fall back to stable where
the candidate fails before its first byte, pass the answer on, leave a record.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prometheus_client import Counter, Histogram

from cluster import metrics
from cluster.errors import InputError
from cluster.settings.serving import ServeSettings
from data.feedback import pseudonym
from data.intake.messages import check_messages
from serve.anomalies import AnomalyWatch
from serve.arms import not_served, plan
from serve.breaker import Breaker, StableLatency
from serve.capture import Capture, Record
from serve.exchange import CHAT, Engines, Exchange, View, new_interaction_id
from serve.keys import Key
from serve.limits import KeyLimits
from serve.openai import (
    JSON,
    ApiError,
    ClientGoneError,
    Headers,
    Receive,
    Scope,
    Send,
    parse_object,
    read_body,
    send_response,
    shown,
    text_header,
)
from serve.prompts import PromptPolicy, prompted
from serve.proxy import UpstreamError
from serve.rewrite import DONE, error_event
from serve.routes import RouteKey
from serve.shadow import Shadow
from serve.snapshot import Target

log = logging.getLogger(__name__)

EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
USER_CHARACTERS, SESSION_CHARACTERS, MODALITY_CHARACTERS, TIER_CHARACTERS = 256, 128, 16, 64
METERS_KEPT = 4_096


@dataclass(slots=True)
class Companions:
    """What stands beside the answering of requests; what is `None` is switched off."""

    limits: KeyLimits
    anomalies: AnomalyWatch
    capture: Capture | None = None
    shadow: Shadow | None = None
    policy: PromptPolicy | None = None


class CompletionHandler:
    """Completions of one router replica; its state is breakers, latencies and open connections."""

    def __init__(self, settings: ServeSettings, engines: Engines, companions: Companions, secret: bytes) -> None:
        self._settings, self._engines, self._with = settings, engines, companions
        self._secret = secret
        self._breakers: dict[str, Breaker] = {}
        self._stable_latency: dict[tuple[RouteKey, bool], StableLatency] = {}

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
        self._with.limits.require_budget(key)
        body = await read_body(scope, receive, self._settings.max_body_bytes, self._settings.body_timeout_s)
        exchange = self._exchange(scope, body, key, view, request_id)
        try:
            async with _in_flight():
                await self._obtain(exchange)
                return await self._deliver(exchange, send, headers)
        except ApiError as error:
            exchange.record.refuse(error.status, error.code)
            raise
        except (asyncio.CancelledError, ClientGoneError, OSError):
            self._client_left(exchange)
            raise
        finally:
            if exchange.reply is not None:
                exchange.reply.abort()
            self._finish(exchange)

    def close(self) -> None:
        """Give up copies under way and drop the connections to the engines; from the event loop."""
        if self._with.shadow is not None:
            self._with.shadow.close()
        self._engines.close()

    def breaker_states(self) -> dict[str, bool]:
        """Version -> True while it is left alone."""
        return {version: breaker.is_open for version, breaker in self._breakers.items()}

    def _exchange(self, scope: Scope, body: bytes, key: Key, view: View, request_id: str) -> Exchange:
        began = time.perf_counter()
        path: str = scope["path"]
        request = parse_chat(body) if path == CHAT else parse_completion(body)
        raw_user = request.get("user") or text_header(scope, b"x-rayloop-user", USER_CHARACTERS)
        user = pseudonym(self._secret, key.tenant, raw_user) if raw_user else None
        session = text_header(scope, b"x-rayloop-session", SESSION_CHARACTERS)
        modality = text_header(scope, b"x-rayloop-modality", MODALITY_CHARACTERS) or "text"
        interaction_id = new_interaction_id(path)
        planned = plan(
            view.snapshot, key.tenant, request["model"],
            modality=modality, user=user, session=session, request=interaction_id,
        )  # fmt: skip
        prompt = view.snapshot.prompts.get((key.tenant, planned.agent))
        if prompt is not None:
            request = prompted(request, prompt, is_chat=path == CHAT)
        record = Record(
            interaction_id, key, planned, request, modality, user, session, _trace_id(scope),
            text_header(scope, b"x-rayloop-user-tier", TIER_CHARACTERS), prompt.digest if prompt else None,
        )  # fmt: skip
        exchange = Exchange(
            path, request, record, began, request_id, view.endpoints,
            wants_token_ids=self._with.capture is not None,
            wants_usage=self._with.limits.budget_of(key) is not None,
        )  # fmt: skip
        if self._with.policy is not None and path == CHAT:
            self._render(self._with.policy, exchange)
        return exchange

    def _render(self, policy: PromptPolicy, exchange: Exchange) -> None:
        """Ask the agent's policy; one that fails costs its advice, not the answer."""
        record = exchange.record
        try:
            exchange.rendered = policy.render(record.key.tenant, record.plan, record.user)
        except Exception:
            log.exception("the policy of %s could not be rendered", record.plan.agent)
        if exchange.rendered is not None:
            record.details |= exchange.rendered.metadata()

    # obtaining an answer

    async def _obtain(self, exchange: Exchange) -> None:
        """The head of an answer: from the version assigned, else from stable."""
        plan = exchange.plan
        if plan.arm != "candidate":
            await self._ask_stable(exchange, plan.target, plan.version)
            return
        try:
            await self._ask_candidate(exchange)
        except UpstreamError as error:
            if plan.fallback is None:  # no engine holds stable: nobody can stand in
                raise self._failed(exchange, error) from None
            self._count_fallback(exchange, error)
            await self._ask_stable(exchange, plan.fallback, plan.fallback.version)

    async def _ask_stable(self, exchange: Exchange, target: Target | None, version: str) -> None:
        if target is None:
            raise not_served(version)
        try:
            await self._ask(exchange, target)
        except UpstreamError as error:
            raise self._failed(exchange, error) from None
        if exchange.plan.arm == "stable" and exchange.record.ttft_s is not None:
            self._latency(exchange).record(exchange.record.ttft_s)

    def _failed(self, exchange: Exchange, error: UpstreamError) -> ApiError:
        exchange.record.timeout = error.code == "engine_timeout"
        return ApiError(error.status, error.message, code=error.code, retry_after_s=self._settings.retry_after_s)

    async def _ask_candidate(self, exchange: Exchange) -> None:
        """Ask the candidate within its budget.

        Raises:
            UpstreamError: it failed, was too slow, or is being left alone.
        """
        version, target = exchange.plan.version, exchange.plan.target
        breaker = self._breakers.setdefault(version, Breaker(self._settings.breaker))
        permit = breaker.allow(time.monotonic())
        if permit is None:
            raise UpstreamError("its breaker is open", code="breaker_open")
        try:
            if target is None:
                raise UpstreamError("no engine holds it", code="version_not_ready")
            async with asyncio.timeout(self._latency(exchange).budget_s()):
                await self._ask(exchange, target)
        except (UpstreamError, TimeoutError) as error:
            breaker.record(permit, False, time.monotonic())
            if isinstance(error, TimeoutError):
                raise UpstreamError("it was slower than its budget", code="engine_timeout") from None
            raise
        except BaseException:  # a request the engine rightly refuses, or a client that left, tells nothing
            breaker.forget(permit)
            raise
        else:
            if exchange.stream:  # a stream is judged at its end
                exchange.permit = permit
            else:
                breaker.record(permit, True, time.monotonic())
        finally:
            metrics.BREAKER_OPEN.labels(version).set(breaker.is_open)

    async def _ask(self, exchange: Exchange, target: Target) -> None:
        fallback = exchange.plan.fallback
        elsewhere = fallback is not None and fallback.engine != target.engine
        await exchange.ask(self._engines, target, elsewhere=elsewhere, retry_after_s=self._settings.retry_after_s)

    def _latency(self, exchange: Exchange) -> StableLatency:
        """A stream's first byte is its first token, a whole answer's is its end: kept apart."""
        route = exchange.plan.route
        assert route is not None, "only a route has arms"
        kind = (route.key, exchange.stream)
        if kind not in self._stable_latency:
            self._stable_latency[kind] = StableLatency(self._settings.fallback)
        return self._stable_latency[kind]

    def _count_fallback(self, exchange: Exchange, error: UpstreamError) -> None:
        exchange.record.fallback = error.code
        exchange.record.timeout = error.code == "engine_timeout"
        key = exchange.record.key
        metrics.FALLBACKS.labels(key.tenant, key.workspace, exchange.plan.agent, error.code).inc()
        log.info("candidate %s: %s; stable answers", exchange.plan.version, error.message)

    # delivering it

    async def _deliver(self, exchange: Exchange, send: Send, headers: Headers) -> int:
        if exchange.stream:
            await self._stream(exchange, send, headers)
        else:
            await send_response(send, 200, exchange.first, [JSON, *exchange.headers(), *headers])
        return 200

    async def _stream(self, exchange: Exchange, send: Send, headers: Headers) -> None:
        rewriter, head = exchange.rewriter, [*EVENT_STREAM, *exchange.headers(), *headers]
        assert rewriter is not None
        finished, tail = False, b""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": head})
            async for piece in exchange.pieces():
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            finished = True
        except UpstreamError as error:
            rewriter.error = error.code
            tail = error_event(ApiError(error.status, error.message, code=error.code)) + DONE
        finally:
            exchange.record.error = rewriter.error
            self._judge_stream(exchange, finished)
        await send({"type": "http.response.body", "body": tail})

    def _judge_stream(self, exchange: Exchange, finished: bool) -> None:
        """A candidate that breaks off fails: its breaker must know, though nobody can stand in any more.

        Of a stream that its client left nobody knows how it would have ended.
        """
        if exchange.permit is None:
            return
        breaker, failed = self._breakers[exchange.plan.version], exchange.record.error is not None
        if finished or failed:
            breaker.record(exchange.permit, not failed, time.monotonic())
        else:
            breaker.forget(exchange.permit)
        metrics.BREAKER_OPEN.labels(exchange.plan.version).set(breaker.is_open)

    # the record

    def _client_left(self, exchange: Exchange) -> None:
        exchange.record.disconnected = True
        key = exchange.record.key
        metrics.DISCONNECTS.labels(key.tenant, key.workspace, exchange.plan.agent).inc()

    def _finish(self, exchange: Exchange) -> None:
        record = exchange.record
        record.latency_s = time.perf_counter() - exchange.began
        meters = _meters_of(record)
        meters.latency.observe(record.latency_s)
        if record.ttft_s is not None:
            meters.first_token.observe(record.ttft_s)
        if self._with.capture is not None:
            self._with.capture.offer(record)
        try:
            self._count_tokens(record)
            self._with.anomalies.observe(record)
            if self._with.shadow is not None:
                self._with.shadow.mirror(exchange)
        except Exception:  # whatever is odd about the request: its answer is out, or its error is
            log.exception("interaction %s could not be watched", record.interaction_id)

    def _count_tokens(self, record: Record) -> None:
        prompt, completion = record.answer.tokens_used()
        if prompt or completion:
            meters = _meters_of(record)
            meters.prompt.inc(prompt)
            meters.completion.inc(completion)
            self._with.limits.spend(record.key, prompt + completion)


@dataclass(frozen=True, slots=True)
class _Meters:
    """The metrics of one arm; looking them up by their labels costs more than counting."""

    latency: Histogram
    first_token: Histogram
    prompt: Counter
    completion: Counter


def _meters_of(record: Record) -> _Meters:
    return _meters(record.key.tenant, record.key.workspace, record.plan.agent, record.plan.arm)


@lru_cache(METERS_KEPT)
def _meters(*labels: str) -> _Meters:
    return _Meters(
        metrics.LATENCY.labels(*labels),
        metrics.FIRST_TOKEN.labels(*labels),
        metrics.TOKENS.labels(*labels, "prompt"),
        metrics.TOKENS.labels(*labels, "completion"),
    )


def parse_chat(body: bytes) -> dict[str, Any]:
    """A chat request; only what we decide by is looked at, the rest passes through.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    request = _parsed(body)
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise _wrong("messages", messages, "must be a list of at least one message")
    try:
        check_messages(messages)
    except InputError as error:
        raise ApiError(400, f"{error}.", code="invalid_value", param=error.field) from None
    return request


def parse_completion(body: bytes) -> dict[str, Any]:
    """A request for the continuation of a text, of several, or of token ids.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    request = _parsed(body)
    prompt = request.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise _wrong("prompt", prompt, "must be a text, a list of texts, or token ids")
    request.pop("messages", None)  # belongs to a chat, where it is checked; the record must not take it for one
    return request


def _parsed(body: bytes) -> dict[str, Any]:
    request = parse_object(body)
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", model, "must name an agent or a version")
    if not isinstance(request.get("stream"), bool | None):
        raise _wrong("stream", request["stream"], "must be true or false")
    user = request.get("user")
    if user is not None and (not isinstance(user, str) or len(user) > USER_CHARACTERS):
        raise _wrong("user", user, f"must be a text of at most {USER_CHARACTERS} characters")
    return request


def _wrong(name: str, value: Any, rule: str) -> ApiError:
    return ApiError(400, f"{name}={shown(value)} {rule}.", code="invalid_value", param=name)


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
