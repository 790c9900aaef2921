"""Every table of the database, in one place; the migrations create exactly these (a test compares).

The event log is the source of truth: `events`, `event_bodies`, `event_ids`, its sealed `partitions`, and
`erasures` with their `tombstones`. `routes` and `servables` hold what the live side should do. The rest are
projections of the log and can be rebuilt.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()
MOMENT_COLUMNS = (
    "users", "sum_n", "sum_y", "sum_nn", "sum_ny", "sum_yy", "sum_m", "sum_mm",
    "known", "sum_x", "sum_xx", "sum_m_known", "sum_xm",
)  # fmt: skip
"""Sums over the users of one arm; `serve.experiments.comparisons.Moments` says what each is."""
Sequence64 = BigInteger().with_variant(Integer, "sqlite")  # SQLite's rowid alias must be INTEGER

events = Table(
    "events",
    metadata,
    Column("seq", Sequence64, primary_key=True, autoincrement=False),
    Column("event_id", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("workspace", String(63), nullable=False),
    Column("occurred_at_us", BigInteger, nullable=False),
    Column("recorded_at_us", BigInteger, nullable=False),
    Column("user_id", String(128)),
    Column("session_id", String(128)),
    Column("agent", String(128)),
    Column("interaction_id", String(128)),
    Column("digest", LargeBinary, nullable=False),
    Column("erased", Boolean, nullable=False, default=False),
    Column("body_digest", LargeBinary),  # of erased events only: what stands in for the body
    Index("events_by_kind", "kind", "seq"),
    Index("events_by_interaction", "tenant", "interaction_id"),
)
event_bodies = Table(
    "event_bodies",
    metadata,
    Column("seq", Sequence64, primary_key=True, autoincrement=False),
    Column("salt", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("arrays", LargeBinary),
)
event_ids = Table(
    "event_ids",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("event_id", String(128), primary_key=True),
    Column("recorded_at_us", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
cursors = Table(
    "cursors",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("updated_at_us", BigInteger, nullable=False),
)
partitions = Table(
    "partitions",
    metadata,
    Column("after_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("day", String(10), primary_key=True),
    Column("upto_seq", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("location", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("num_events", BigInteger, nullable=False),
    Column("num_bytes", BigInteger),
    Column("sha256", String(64)),
    Column("root", String(64)),
    Column("sealed_at_us", BigInteger),
    Column("bodies_left_us", BigInteger),
)
erasures = Table(
    "erasures",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("events", JSON, nullable=False),
    Column("report", JSON),
    Column("started_at_us", BigInteger, nullable=False),
    Column("finished_at_us", BigInteger),
)
tombstones = Table(
    "tombstones",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("subject", String(160), primary_key=True),
    Column("erased_at_us", BigInteger, nullable=False),
)

routes = Table(
    "routes",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("agent", String(128), primary_key=True),
    Column("modality", String(16), primary_key=True),
    Column("stable", String(160), nullable=False),
    Column("arms", JSON, nullable=False),  # candidates in order: version, start, share, experiment_id
    Column("max_share", Double, nullable=False, default=1.0),
    Column("shadow", String(160)),
    Column("experiment_id", String(64)),
    Column("salt", String(64), nullable=False),
    Column("pinned", Boolean, nullable=False, default=False),
    Column("revision", BigInteger, nullable=False),
    Column("config_hash", String(64)),
    Column("config_generation", BigInteger),
    Column("updated_at_us", BigInteger, nullable=False),
    Column("updated_by", String(128), nullable=False),
)
router_configs = Table(
    "router_configs",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("document", JSON, nullable=False),  # of the deployment config that was accepted last
    Column("accepted_at_us", BigInteger, nullable=False),
)
api_keys = Table(
    "api_keys",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("key_id", String(32), nullable=False, unique=True),
    Column("name", String(128), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("workspace", String(63), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("user_tier", String(32)),
    Column("created_at_us", BigInteger, nullable=False),
    Column("expires_at_us", BigInteger),
    Column("revoked_at_us", BigInteger),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
)
key_usage = Table(
    "key_usage",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)
servables = Table(
    "servables",
    metadata,
    Column("version", String(160), primary_key=True),
    Column("engine", String(63), primary_key=True),
    Column("model_name", String(200), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("adapter_path", Text),
    Column("adapter_sha256", String(64)),
    Column("base_revision", String(128)),
    Column("template_digest", String(64)),
    Column("alias", String(256)),
    Column("tenant", String(63)),
    Column("wanted", Boolean, nullable=False, default=True),
    Column("updated_at_us", BigInteger, nullable=False),
)
servable_replicas = Table(
    "servable_replicas",
    metadata,
    Column("engine", String(63), primary_key=True),
    Column("replica_id", String(64), primary_key=True),
    Column("version", String(160), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("heartbeat_us", BigInteger, nullable=False),
)
router_replicas = Table(
    "router_replicas",
    metadata,
    Column("replica_id", String(64), primary_key=True),
    Column("revisions", JSON, nullable=False),  # route -> the revision of it that the replica serves
    Column("heartbeat_us", BigInteger, nullable=False),
)

experiments = Table(
    "experiments",
    metadata,
    Column("experiment_id", String(64), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("workspace", String(63), nullable=False),
    Column("agent", String(128), nullable=False),
    Column("modality", String(16), nullable=False),
    Column("layer", String(128), nullable=False),
    Column("salt", String(64), nullable=False),
    Column("stable", String(160), nullable=False),
    Column("candidate", String(160), nullable=False),
    Column("bucket_low", Double, nullable=False),
    Column("bucket_high", Double, nullable=False),
    Column("config", JSON, nullable=False),
    Column("state", String(32), nullable=False),
    Column("outcome", String(32)),
    Column("created_at_us", BigInteger, nullable=False),
    Column("ended_at_us", BigInteger),
)
experiment_users = Table(
    "experiment_users",
    metadata,
    Column("experiment_id", String(64), primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("arm", String(16), nullable=False),
    Column("bucket", Double, nullable=False),
    Column("excluded", Boolean, nullable=False, default=False),
    Column("segments", JSON, nullable=False),
    Column("covariates", JSON, nullable=False),
    Column("first_seen_us", BigInteger, nullable=False),
)
experiment_arms = Table(
    "experiment_arms",
    metadata,
    Column("experiment_id", String(64), primary_key=True),
    Column("share", Double, primary_key=True),
    Column("arm", String(16), primary_key=True),
    Column("users", BigInteger, nullable=False),
    Column("last_seen_us", BigInteger, nullable=False),
)
arm_statistics = Table(
    "arm_statistics",
    metadata,
    Column("experiment_id", String(64), primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("period", String(16), primary_key=True),
    Column("arm", String(16), primary_key=True),
    Column("sums", Text, nullable=False),  # JSON: metric -> [count, total, …]; one row a user, not one a metric
)
arm_moments = Table(
    "arm_moments",
    metadata,
    Column("experiment_id", String(64), primary_key=True),
    Column("segment", String(160), primary_key=True),
    Column("period", String(16), primary_key=True),
    Column("metric", String(80), primary_key=True),
    Column("arm", String(16), primary_key=True),
    *(Column(name, Double, nullable=False) for name in MOMENT_COLUMNS),
)
arm_history = Table(
    "arm_history",
    metadata,
    Column("experiment_id", String(64), primary_key=True),
    Column("period", String(16), primary_key=True),
    Column("at_us", BigInteger, primary_key=True),
    Column("metric", String(80), primary_key=True),
    Column("arm", String(16), primary_key=True),
    *(Column(name, Double, nullable=False) for name in MOMENT_COLUMNS),
)
arm_histograms = Table(
    "arm_histograms",
    metadata,
    Column("experiment_id", String(64), primary_key=True),
    Column("metric", String(80), primary_key=True),
    Column("period", String(16), primary_key=True),
    Column("arm", String(16), primary_key=True),
    Column("bin", Integer, primary_key=True, autoincrement=False),
    Column("count", Double, nullable=False),
)
user_baselines = Table(
    "user_baselines",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("agent", String(128), primary_key=True),
    Column("metric", String(80), primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("count", Double, nullable=False),
    Column("total", Double, nullable=False),
)
rollouts = Table(
    "rollouts",
    metadata,
    Column("rollout_id", String(64), primary_key=True),
    Column("experiment_id", String(64), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("agent", String(128), nullable=False),
    Column("modality", String(16), nullable=False),
    Column("state", String(32), nullable=False),
    Column("stage", Integer, nullable=False),
    Column("stage_started_us", BigInteger, nullable=False),
    Column("holding_since_us", BigInteger),
    Column("approved_stage", Integer),
    Column("decisions", Integer, nullable=False, default=0),
    Column("pending_decision", JSON),
    Column("progress", JSON, nullable=False),
    Column("config", JSON, nullable=False),
    Column("reason", Text),
    Column("revision", BigInteger, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("updated_at_us", BigInteger, nullable=False),
)
leases = Table(
    "leases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)
outlets = Table(
    "outlets",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("delivered", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("retry_at_us", BigInteger, nullable=False),
    Column("failure", Text),
    Column("updated_at_us", BigInteger, nullable=False),
)
dead_letters = Table(
    "dead_letters",
    metadata,
    Column("outlet", String(63), primary_key=True),
    Column("seq", Sequence64, primary_key=True, autoincrement=False),
    Column("event_id", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("reason", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("died_at_us", BigInteger, nullable=False),
)
judged_answers = Table(
    "judged_answers",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("grader_version", String(64), nullable=False),
    Column("reward", Double, nullable=False),
    Column("scores", JSON, nullable=False),
    Column("reason", String(200), nullable=False),
    Column("judged_at_us", BigInteger, nullable=False),
    Index("judged_answers_by_age", "judged_at_us"),
)
tool_replies = Table(
    "tool_replies",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("workspace", String(63), primary_key=True),
    Column("tool", String(64), primary_key=True),
    Column("idempotency_key", String(128), primary_key=True),
    Column("arguments_digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reply", JSON(none_as_null=True)),
    Column("begun_at_us", BigInteger, nullable=False),
    Index("tool_replies_by_age", "begun_at_us"),
)
training_jobs = Table(
    "training_jobs",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("workspace", String(63), nullable=False),
    Column("agent", String(128)),
    Column("kind", String(32), nullable=False),
    Column("dataset_id", String(128)),
    Column("config", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("progress", JSON),
    Column("retries", Integer, nullable=False, default=0),
    Column("output_version", String(160)),
    Column("error", Text),
    Column("created_at_us", BigInteger, nullable=False),
    Column("started_at_us", BigInteger),
    Column("finished_at_us", BigInteger),
    Column("used_s", Double, nullable=False, default=0.0),
    Column("gpus", Double, nullable=False, default=0.0),
    Column("used_gpu_s", Double, nullable=False, default=0.0),
    Column("request", JSON(none_as_null=True)),
    Column("runner", JSON(none_as_null=True)),
    Column("stopping", Boolean, nullable=False, default=False),
    Column("fine_tuned_model", String(256)),
    Index("training_jobs_by_state", "state", "created_at_us"),
)
job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("level", String(8), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON(none_as_null=True)),
)
uploaded_files = Table(
    "uploaded_files",
    metadata,
    Column("file_id", String(64), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("workspace", String(63), nullable=False),
    Column("filename", String(256), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("format", String(16)),
    Column("rows", Integer, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Index("uploaded_files_by_tenant", "tenant", "created_at_us"),
)
