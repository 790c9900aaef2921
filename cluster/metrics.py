"""Every metric, declared once; `docs/` and the dashboards are made from this list.

Metrics live in one process, which answers `/metrics` with its own; `cluster.metrics_files` brings those of several to
one address.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

REGISTRY = CollectorRegistry()
CONTENT_TYPE = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
OWNER = ("tenant", "workspace")
"""Labels of whatever belongs to somebody; of the key that asked."""
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

REQUESTS = Counter("rayloop_requests_total", "Requests answered by the router.", ["route", "status"], registry=REGISTRY)
LATENCY = Histogram(
    "rayloop_request_seconds",
    "From the whole request to the end of the answer.",
    [*OWNER, "agent", "arm"],
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
FIRST_TOKEN = Histogram(
    "rayloop_first_token_seconds",
    "From the whole request to the first byte of the answer.",
    [*OWNER, "agent", "arm"],
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
FALLBACKS = Counter(
    "rayloop_fallbacks_total",
    "Requests of the candidate that stable answered.",
    [*OWNER, "agent", "cause"],
    registry=REGISTRY,
)
BREAKER_OPEN = Gauge("rayloop_breaker_open", "1 while a version is left alone.", ["version"], registry=REGISTRY)
DISCONNECTS = Counter(
    "rayloop_disconnects_total", "Clients that went away before the end.", [*OWNER, "agent"], registry=REGISTRY
)
IN_FLIGHT = Gauge("rayloop_in_flight", "Chat requests being worked on.", registry=REGISTRY)
OVERLOADED = Counter("rayloop_overloaded_total", "Requests refused because too many were in flight.", registry=REGISTRY)
LIMITED = Counter("rayloop_limited_total", "Requests refused by a limit of their key.", ["limit"], registry=REGISTRY)
TOKENS = Counter(
    "rayloop_tokens_total", "Tokens that engines counted.", [*OWNER, "agent", "arm", "kind"], registry=REGISTRY
)
SHADOWED = Counter(
    "rayloop_shadowed_total",
    "Copies of requests by what became of them.",
    [*OWNER, "agent", "outcome"],
    registry=REGISTRY,
)
SHADOW_IN_FLIGHT = Gauge("rayloop_shadow_in_flight", "Copies under way.", registry=REGISTRY)
ANOMALIES = Counter(
    "rayloop_anomalies_total", "Times a version left the ordinary.", ["tenant", "version", "signal"], registry=REGISTRY
)
ROUTE_REVISION = Gauge(
    "rayloop_route_revision",
    "Revision of each route this router serves.",
    ["tenant", "agent", "modality"],
    registry=REGISTRY,
)
ROUTE_SHARE = Gauge(
    "rayloop_route_share",
    "Share of users on the candidate, as in force here.",
    ["tenant", "agent", "modality"],
    registry=REGISTRY,
)
SNAPSHOT_AGE = Gauge("rayloop_snapshot_age_seconds", "Age of the routes and keys in use.", registry=REGISTRY)
CONFIG_REJECTED = Counter("rayloop_config_rejected_total", "Deployment configs refused.", registry=REGISTRY)
CAPTURED = Counter("rayloop_captured_total", "Interactions by what became of them.", ["outcome"], registry=REGISTRY)
CAPTURE_WAITING = Gauge("rayloop_capture_waiting", "Interactions that wait for the log.", registry=REGISTRY)
SPOOL_BYTES = Gauge("rayloop_spool_bytes", "Interactions on disk that wait for the log.", registry=REGISTRY)
INTAKE = Counter("rayloop_intake_total", "Events that came in over HTTP.", ["kind", "status"], registry=REGISTRY)

GRADES = Counter(
    "rayloop_grades_total",
    "Grades by what became of them: `graded`, `cached`, `abstained`, or the flag of what failed.",
    ["type", "outcome"],
    registry=REGISTRY,
)
GRADE_SECONDS = Histogram(
    "rayloop_grade_seconds",
    "From the task to its grade or abstention, without what the cache knew.",
    ["type"],
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
GRADES_WAITING = Gauge("rayloop_grades_waiting", "Answers that are being graded.", registry=REGISTRY)
ONLINE_GRADES = Counter(
    "rayloop_online_grades_total", "Sampled live answers by what became of them.", ["outcome"], registry=REGISTRY
)
SHADOW_PAIRS = Counter(
    "rayloop_shadow_pairs_total",
    "Live answers against the shadow's: `won`, `tied`, `lost`, or `abstained`.",
    ["agent", "outcome"],
    registry=REGISTRY,
)

TOOL_CALLS = Counter(
    "rayloop_tool_calls_total", "Calls of tools by what became of them.", ["tool", "outcome"], registry=REGISTRY
)
TOOL_SECONDS = Histogram(
    "rayloop_tool_seconds",
    "From the call to its result or refusal.",
    ["tool"],
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)

EVENTS_WAITING = Gauge("rayloop_events_waiting", "Events that wait for their commit.", registry=REGISTRY)
EVENTS_REFUSED = Counter(
    "rayloop_events_refused_total", "Events turned away because too many waited for the log.", registry=REGISTRY
)

DELIVERED = Counter("rayloop_outlet_delivered_total", "Events that an outlet delivered.", ["outlet"], registry=REGISTRY)
DELIVERY_FAILURES = Counter(
    "rayloop_outlet_failures_total",
    "Deliveries that failed, by what becomes of the event: tried again (`retry`) or put aside (`dead`).",
    ["outlet", "outcome"],
    registry=REGISTRY,
)
OUTLET_WAITING = Gauge(
    "rayloop_outlet_waiting", "Events of an outlet's kinds that it has not come to.", ["outlet"], registry=REGISTRY
)
DEAD_LETTERS = Gauge("rayloop_outlet_dead_letters", "Events that an outlet put aside.", ["outlet"], registry=REGISTRY)

TRAINING_SECONDS = Gauge(
    "rayloop_training_seconds",
    "Seconds that the training jobs of a tenant have run, in all.",
    ["tenant"],
    registry=REGISTRY,
)


def exposition() -> bytes:
    """All metrics of this process in Prometheus' text format."""
    return generate_latest(REGISTRY)
