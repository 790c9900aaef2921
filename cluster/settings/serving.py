"""The live side: router and keys (serving.md)."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.settings.base import Section


class EngineEndpoint(Section):
    """An OpenAI-compatible server that answers for versions: an application here, or one elsewhere."""

    base_url: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    """Address in front of `/v1/chat/completions`. `None` means the application `engine` of this Serve."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the bearer key the server wants."""
    token_ids: bool = True
    """The server understands `return_token_ids`; a hosted API usually refuses the field."""
    models: dict[str, str] = {}
    """Version id -> model name at that server, for versions that no `servables` row describes."""


class BreakerSettings(Section):
    """When a version that fails is left alone for a while."""

    consecutive: int = Field(5, ge=1)
    """Failures in a row that open the breaker."""
    window: int = Field(20, ge=2)
    """Requests looked back over."""
    window_share: float = Field(0.5, gt=0, le=1)
    """Share of failures in a full window that opens it."""
    half_open_s: float = Field(30.0, gt=0)
    """How long it stays open before one request is let through."""


class FallbackSettings(Section):
    """When stable answers in place of the candidate."""

    budget_s: float = Field(10.0, gt=0)
    """The candidate's first byte must come within this time…"""
    stable_p95_factor: float = Field(2.0, gt=0)
    """…and within this many times stable's p95, whichever is less."""
    min_budget_s: float = Field(1.0, ge=0)
    """But it always gets this much: the p95 of a fast engine is noise. 0 gives no such grace."""
    p95_window: int = Field(200, ge=20)
    """Latest stable answers that the p95 is taken over; fewer than 20 give none."""


class CaptureQueueSettings(Section):
    """Interactions between the answer and the log."""

    queue_events: int = Field(20_000, ge=1)
    """Interactions that may wait for the log; beyond it they are counted as lost."""
    linger_ms: float = Field(20.0, ge=0)
    """How long a batch may grow before it is written: fewer, larger transactions. Nobody waits for it."""
    retry_s: float = Field(1.0, gt=0)
    """Pause before the log is tried again after it failed; until then interactions go to the spool."""
    spool_max_mb: int = Field(512, ge=1)
    """Size of one router's spool; beyond it interactions are counted as lost."""
    adopt_s: float = Field(60.0, ge=1)
    """How often a router looks for spools that dead ones left under the same `home`."""


class KeyLimitSettings(Section):
    """What one API key may use; a key's own limits go before these."""

    requests_per_minute: int | None = Field(None, ge=1)
    """Requests of a key that has no limit of its own; `None` sets none."""
    tokens_per_day: int | None = Field(None, ge=1)
    """Tokens, of prompts and answers, a UTC day for a key that has no budget of its own; `None` sets none."""
    burst_s: float = Field(10.0, gt=0)
    """So many seconds' worth of requests may come at once."""


class JwtSettings(Section):
    """Tokens of an identity provider beside our own keys; off while `issuer` is not set."""

    issuer: str | None = None
    """`iss` of the tokens that are taken."""
    audience: str | None = None
    """`aud` that they must have."""
    jwks_url: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    """Where the provider publishes its keys, as a JSON Web Key Set."""
    jwks_file: str | None = None
    """The same as a file, where the provider cannot be reached."""
    algorithms: tuple[Literal["RS256", "RS512", "PS256", "ES256", "ES384", "EdDSA"], ...] = ("RS256", "ES256")
    """Signatures that are taken; never symmetric ones."""
    tenant_claim: str | None = "tenant"
    """Claim that holds the tenant; `None` means that all tokens belong to `tenant`."""
    workspace_claim: str | None = None
    """Claim that holds the workspace; `None` means `workspace`."""
    scopes_claim: str = "scope"
    """Claim with the scopes: a text with spaces between them, or a list."""
    scopes: tuple[str, ...] = ("chat", "feedback")
    """The most that a token can be given, whatever it claims."""
    leeway_s: float = Field(30.0, ge=0, le=300)
    """How far clocks may disagree."""
    refresh_s: float = Field(300.0, ge=1)
    """How often the key set is read again."""

    @model_validator(mode="after")
    def _is_whole(self) -> "JwtSettings":
        if self.issuer is None:
            return self
        if self.audience is None:
            raise ValueError(
                "serve.jwt.audience must be set with serve.jwt.issuer: a token for somebody else would pass"
            )
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise ValueError("serve.jwt needs one of jwks_url and jwks_file")
        return self


class ShadowSettings(Section):
    """Copies of requests to a route's `shadow` version, or to the other arm's, whose answers nobody sees."""

    enabled: bool = False
    """Send copies; needs `capture.enabled`, as an answer that is not recorded helps nobody."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of a route's requests that are copied."""
    max_concurrent: int = Field(8, ge=1)
    """Copies one router replica has under way at once; more are dropped and counted."""
    max_load: float = Field(0.5, gt=0, le=1)
    """No copy is sent while this share of `serve.max_ongoing_requests` is being answered."""
    timeout_s: float = Field(60.0, gt=0)
    """How long a copy may take."""
    disagreement_below: float = Field(0.5, ge=0, le=1)
    """Answers that agree less than this disagree (see `serve.shadow.agreement`)."""
    review_share: float = Field(0.1, ge=0, le=1)
    """Share of the disagreements that people are asked to label."""


class AnomalySettings(Section):
    """When a version's live behaviour is out of the ordinary."""

    enabled: bool = True
    """Watch; costs a few numbers per request."""
    window: int = Field(200, ge=20)
    """Latest requests of a version that are looked at."""
    min_requests: int = Field(50, ge=10)
    """Fewer say nothing."""
    check_s: float = Field(1.0, gt=0)
    """How often the windows are looked at."""
    repeat_s: float = Field(600.0, gt=0)
    """How long until an anomaly that persists is recorded again."""
    latency_factor: float = Field(2.0, gt=1)
    """A p95 latency above this many times stable's p95 is one…"""
    latency_min_s: float = Field(1.0, gt=0)
    """…where it is also above this: the p95 of a fast engine is noise."""
    error_excess: float = Field(0.05, gt=0, le=1)
    """So much more of its requests fail than of stable's."""
    tool_error_excess: float = Field(0.1, gt=0, le=1)
    """So much more of the tool calls fail than of stable's."""
    safety_excess: float = Field(0.02, gt=0, le=1)
    """So much more of its answers are stopped by a filter than of stable's; refusals are none of them."""


class ServeSettings(Section):
    """The router and how it is reached."""

    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of the API; 0 takes a free one."""
    ingress: Literal["haproxy", "proxy"] = "haproxy"
    """`haproxy`: HAProxy in front of the replicas' own ports; `proxy`: Ray Serve's Python proxy."""
    haproxy_threads: int = Field(1, ge=1, le=64)
    """Threads of HAProxy."""
    dashboard: bool = True
    """Start Ray's dashboard on loopback; `serve deploy` talks to it."""
    applications: list[Literal["gateway", "engine", "grader", "tools", "control"]] = [
        "gateway",
        "engine",
        "grader",
        "tools",
        "control",
    ]
    """What `rayloop up` deploys; a smaller list is for engines elsewhere and for tests."""
    start_timeout_s: float = Field(120.0, gt=0)
    """How long `rayloop up` waits until every application runs."""
    proxy_ready_s: float = Field(30.0, gt=0)
    """How long the ingress may take to answer a check. Serve's own 5 s end it on a busy machine."""
    router_replicas: int = Field(1, ge=1)
    """Replicas of the router."""
    router_cpus: float = Field(0.1, ge=0)
    """Logical CPUs each router replica reserves."""
    switch_interval_ms: float = Field(0.5, ge=0.01, le=5)
    """Longest that the thread which records interactions holds up the one that answers, in a router's process."""
    drain_s: float = Field(2.0, ge=0)
    """How long a stopping replica finishes what it has before its connections are cut. Serve applies a
    new configuration only after draining, so this also bounds how fast an edited share takes effect."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Completions one router replica works on at once, and as many other requests; more are answered 429 at once."""
    max_body_bytes: int = Field(2_000_000, ge=1024)
    """Longer request bodies are answered 413 without being read to the end."""
    max_batch_bytes: int = Field(16_000_000, ge=1024)
    """The same for batches of feedback and traces, packed or unpacked: exporters send hundreds of spans at once."""
    max_response_bytes: int = Field(32_000_000, ge=1024)
    """Longer engine answers are cut off as a failure of the engine."""
    max_event_bytes: int = Field(1_000_000, ge=1024)
    """The same for one event of an engine's stream."""
    body_timeout_s: float = Field(30.0, gt=0)
    """How long a client may take to send its body."""
    write_timeout_s: float = Field(30.0, gt=0)
    """How long a client may take over each piece of its answer; one that stops reading is let go, by the router and by
    the ingress before it."""
    connect_timeout_s: float = Field(2.0, gt=0)
    """How long a connection to an engine may take."""
    connect_attempts: int = Field(2, ge=1, le=10)
    """How often a connection to an engine that refuses it is tried; nothing was sent yet, so no work is repeated."""
    request_timeout_s: float = Field(120.0, gt=0)
    """How long an engine may take over a whole answer, and between two pieces of a stream."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts of `engines`, `host` or `host:port`, that may lie on private, loopback or metadata addresses or be
    reached without TLS. Every other engine must be https on a public address."""
    upstream_connections: int = Field(256, ge=1)
    """Idle connections kept open to one engine."""
    open_metrics: bool = False
    """Answer `/metrics` of router, grader, tools and control without a key; else it wants one of `tenant` with the
    scope `admin`, as it names everybody's agents."""
    retry_after_s: float = Field(1.0, gt=0)
    """What `Retry-After` says when we are overloaded."""
    poll_ms: float = Field(250.0, ge=10, le=2000)
    """How often routers read routes, servable versions and keys."""
    live_after_s: float = Field(10.0, gt=2)
    """A router replica that has not reported for this long counts as gone. No candidate is promoted before every
    other one serves it to everybody."""
    feedback_timeout_s: float = Field(10.0, gt=0)
    """How long an event may wait for its commit before the client is asked to come again."""
    routes: list[dict[str, Any]] = []
    """Routes that the deployment config declares, as in its `user_config`: agent, stable, candidate, share,
    max_share, pinned. Written into the routes once, whenever the declaration changes."""
    engines: dict[str, EngineEndpoint] = {"local": EngineEndpoint()}
    """Engines by name; `servables` rows refer to them."""
    limits: KeyLimitSettings = KeyLimitSettings()
    jwt: JwtSettings = JwtSettings()
    anomaly: AnomalySettings = AnomalySettings()
    breaker: BreakerSettings = BreakerSettings()
    fallback: FallbackSettings = FallbackSettings()
    capture: CaptureQueueSettings = CaptureQueueSettings()

    @model_validator(mode="after")
    def _budget_holds_minimum(self) -> "ServeSettings":
        if self.fallback.min_budget_s > self.fallback.budget_s:
            raise ValueError("serve.fallback.min_budget_s must not exceed serve.fallback.budget_s")
        return self
