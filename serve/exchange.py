"""One request on its way through the router, and the engines it can go to."""

import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from cluster.errors import ConfigError
from cluster.settings.serving import EngineEndpoint, ServeSettings
from serve.applications.document import is_ours
from serve.arms import Plan
from serve.breaker import Permit
from serve.capture import Record
from serve.openai import ApiError, Headers, from_engine
from serve.prompts import Rendered, with_policy
from serve.proxy import Limits, Reply, Upstream, UpstreamError
from serve.rewrite import NO_COMPLETION, Answer, Rewriter, Wanted
from serve.snapshot import Snapshot, Target

log = logging.getLogger(__name__)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ID_PREFIXES = {CHAT: "chatcmpl", TEXT: "cmpl"}


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
        """The connections to an engine; new ones when its address was changed.

        Raises:
            UpstreamError: the engine's address may not be called.
        """
        known = self._open.get(name)
        if known is not None and known[0] == endpoint:
            return known[1]
        try:
            made = self._made(name, endpoint)
        except ConfigError:
            raise UpstreamError("its address is not allowed", code="engine_address_refused", status=503) from None
        if known is not None:
            known[1].close()
        self._open[name] = (endpoint, made)
        return made

    def _made(self, name: str, endpoint: EngineEndpoint) -> Upstream:
        settings = self.settings
        limits = Limits(
            connect_timeout_s=settings.connect_timeout_s,
            silence_timeout_s=settings.request_timeout_s,
            max_idle=settings.upstream_connections,
            max_response_bytes=settings.max_response_bytes,
            connect_attempts=settings.connect_attempts,
        )
        key = self.environment.get(endpoint.api_key_env) if endpoint.api_key_env else None
        if endpoint.base_url is None:
            return Upstream(self.application_url(name), limits, key or self.engine_token)
        return Upstream(endpoint.base_url, limits, key, allowed=settings.allowed_hosts)

    def application_url(self, name: str) -> str:
        """The application `engine`, or the one of that name beside it (`serve.applications`)."""
        return f"{self.default_url.removesuffix('/engine')}/{name}" if is_ours(name) else self.default_url

    def close(self) -> None:
        """Drop every connection."""
        for _, upstream in self._open.values():
            upstream.close()


@dataclass(slots=True)
class Exchange:
    """What a request asks, the plan for it, and the record it will leave."""

    path: str
    request: dict[str, Any]
    record: Record
    began: float
    request_id: str
    endpoints: Mapping[str, EngineEndpoint]
    wants_token_ids: bool
    """For the record."""
    wants_usage: bool = False
    """For the key's budget."""
    rendered: Rendered | None = None
    """What the agent's policy adds to the system prompt."""
    permit: Permit | None = None
    """Of the candidate's breaker, which waits for the end of its stream."""
    served: Target | None = None
    reply: Reply | None = None
    rewriter: Rewriter | None = None
    """Turns that engine's answer into ours."""
    first: bytes = b""
    """The answer, or the first piece of a stream, as the client gets it; it shows that the engine works."""

    @property
    def plan(self) -> Plan:
        """Who should answer."""
        return self.record.plan

    @property
    def stream(self) -> bool:
        """The answer comes in pieces."""
        return bool(self.request.get("stream"))

    def body_for(self, target: Target) -> bytes:
        """The request as that engine gets it."""
        sent = self.request | {"model": target.model_name}
        if self.rendered is not None and self.path == CHAT:
            sent["messages"] = with_policy(sent["messages"], self.rendered)
        if self.wants_token_ids and self.endpoints[target.engine].token_ids:
            sent |= {"return_token_ids": True, "logprobs": self._logprobs()}
        if self.wants_usage and self.stream:
            options = sent.get("stream_options")
            sent["stream_options"] = (options if isinstance(options, dict) else {}) | {"include_usage": True}
        try:
            return orjson.dumps(sent)
        except TypeError:
            raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None

    def _logprobs(self) -> Any:
        """A chat asks for them or not; a completion for so many alternatives beside the token's own."""
        asked = self.request.get("logprobs")
        if self.path == CHAT:
            return asked if asked and asked is not True else True  # what is neither is for the engine to refuse
        return 0 if asked is None else asked

    async def ask(self, engines: Engines, target: Target, *, elsewhere: bool, retry_after_s: float) -> None:
        """Send the request and wait for the first piece of a good answer.

        `elsewhere`: another engine could answer in place of one that has too much to do.

        Raises:
            UpstreamError: the engine failed.
            ApiError: the engine refused the request (4xx), in OpenAI's shape.
        """
        endpoint = self.endpoints.get(target.engine)
        if endpoint is None:
            raise UpstreamError(f"engine {target.engine} is not configured", code="engine_unavailable", status=503)
        upstream = engines.upstream(target.engine, endpoint)
        reply = await upstream.post(self.path, self.body_for(target), request_id=self.request_id)
        try:
            if reply.status != 200:
                raise _failure(reply, await reply.read(), target, elsewhere, retry_after_s)
            self._begin(target, await reply.next() if self.stream else await reply.read(), engines.settings)
        except BaseException:
            reply.abort()
            raise
        self.reply, self.served = reply, target
        self.record.served_version, self.record.adapter_digest = target.version, target.digest
        self.record.ttft_s = time.perf_counter() - self.began

    def _begin(self, target: Target, piece: bytes, settings: ServeSettings) -> None:
        """Take the first piece of an answer.

        Raises:
            UpstreamError: it is empty, no completion, or an error with a 200 in front.
        """
        if not piece:
            raise UpstreamError("the engine's answer was empty", code="engine_error")
        self.record.answer = Answer()  # of an engine that failed nothing stays
        wanted = Wanted.by(self.request, is_chat=self.path == CHAT)
        rewriter = Rewriter(
            self.record.interaction_id, target.version, wanted, settings.max_event_bytes, self.record.answer
        )
        self.first = understood(rewriter.feed if self.stream else rewriter.whole, piece)
        if rewriter.error is not None:
            raise UpstreamError("the engine failed at once", code=rewriter.error)
        self.rewriter = rewriter

    async def pieces(self) -> AsyncIterator[bytes]:
        """A stream for the client, from `first` on; the rewriter has `error` where the engine told of one.

        Raises:
            UpstreamError: it broke off, fell silent, or is no completion.
        """
        assert self.reply is not None and self.rewriter is not None
        yield self.first
        while more := await self.reply.next():
            yield understood(self.rewriter.feed, more)
        yield understood(self.rewriter.end)

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


def understood(rewrite: Callable[..., bytes], *piece: bytes) -> bytes:
    """What a `Rewriter` makes of a piece.

    Raises:
        UpstreamError: the answer is no completion.
    """
    try:
        return rewrite(*piece)
    except NO_COMPLETION as error:
        log.info("the engine's answer is not a completion: %r", error)
        raise UpstreamError("the engine's answer is not a completion", code="engine_error") from None


def new_interaction_id(path: str = CHAT) -> str:
    """A completion id that sorts by time, as UUIDv7 does; needs to be unique, not secret."""
    return f"{ID_PREFIXES[path]}-{time.time_ns() // 1_000_000:012x}{random.getrandbits(80):020x}"


def _failure(reply: Reply, body: bytes, target: Target, elsewhere: bool, retry_after_s: float) -> Exception:
    """An engine's refusal: its own fault (then somebody else may answer) or the request's.

    A redirect is never followed: it would lead to an address that nobody checked.
    """
    if reply.status < 400:
        return UpstreamError(f"engine {target.engine} answered {reply.status}, not 200", code="engine_error")
    if reply.status in (401, 403):  # its message may quote our credentials
        return UpstreamError(f"engine {target.engine} refuses the router's credentials", code="engine_credentials")
    error = from_engine(reply.status, body)
    if reply.status >= 500 or reply.status in (404, 408) or (reply.status == 429 and elsewhere):
        status = reply.status if reply.status in (503, 504) else 502
        return UpstreamError(
            f"engine {target.engine}: {error.message}", code=error.code or "engine_error", status=status
        )
    if reply.status == 429:
        after = reply.headers.get(b"retry-after", b"")
        error.retry_after_s = float(after) if after.isdigit() else retry_after_s
    return error
