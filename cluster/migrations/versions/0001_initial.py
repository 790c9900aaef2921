"""The first schema. Frozen: a later change of `cluster/tables/` is a new migration."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

Sequence64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create every table of the first release."""
    _create_log()
    _create_partitions_and_erasures()
    _create_live_side()
    _create_experiments()
    _create_moments()
    _create_jobs()
    _create_services()


def downgrade() -> None:
    """Drop them again."""
    for table in TABLES:
        op.drop_table(table)


def _create_log() -> None:
    op.create_table(
        "events",
        sa.Column("seq", Sequence64, primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("workspace", sa.String(63), nullable=False),
        sa.Column("occurred_at_us", sa.BigInteger(), nullable=False),
        sa.Column("recorded_at_us", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.String(128)),
        sa.Column("session_id", sa.String(128)),
        sa.Column("agent", sa.String(128)),
        sa.Column("interaction_id", sa.String(128)),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("erased", sa.Boolean(), nullable=False),
        sa.Column("body_digest", sa.LargeBinary()),
    )
    op.create_index("events_by_interaction", "events", ["tenant", "interaction_id"])
    op.create_index("events_by_kind", "events", ["kind", "seq"])
    op.create_table(
        "event_bodies",
        sa.Column("seq", Sequence64, primary_key=True, autoincrement=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("arrays", sa.LargeBinary()),
    )
    op.create_table(
        "event_ids",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("event_id", sa.String(128), primary_key=True),
        sa.Column("recorded_at_us", sa.BigInteger(), nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "cursors",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
    )


def _create_partitions_and_erasures() -> None:
    op.create_table(
        "partitions",
        sa.Column("after_seq", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("upto_seq", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("num_events", sa.BigInteger(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger()),
        sa.Column("sha256", sa.String(64)),
        sa.Column("root", sa.String(64)),
        sa.Column("sealed_at_us", sa.BigInteger()),
        sa.Column("bodies_left_us", sa.BigInteger()),
    )
    op.create_table(
        "erasures",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("user_id", sa.String(128), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("report", sa.JSON()),
        sa.Column("started_at_us", sa.BigInteger(), nullable=False),
        sa.Column("finished_at_us", sa.BigInteger()),
    )
    op.create_table(
        "tombstones",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("subject", sa.String(160), primary_key=True),
        sa.Column("erased_at_us", sa.BigInteger(), nullable=False),
    )


def _create_live_side() -> None:
    op.create_table(
        "routes",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("agent", sa.String(128), primary_key=True),
        sa.Column("modality", sa.String(16), primary_key=True),
        sa.Column("stable", sa.String(160), nullable=False),
        sa.Column("arms", sa.JSON(), nullable=False),
        sa.Column("max_share", sa.Double(), nullable=False),
        sa.Column("shadow", sa.String(160)),
        sa.Column("experiment_id", sa.String(64)),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("config_hash", sa.String(64)),
        sa.Column("config_generation", sa.BigInteger()),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_by", sa.String(128), nullable=False),
    )
    op.create_table(
        "router_configs",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("accepted_at_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "agent_prompts",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("agent", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("system", sa.Text(), nullable=False),
        sa.Column("refusals", sa.JSON(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), nullable=False, unique=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("workspace", sa.String(63), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("user_tier", sa.String(32)),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_us", sa.BigInteger()),
        sa.Column("revoked_at_us", sa.BigInteger()),
        sa.Column("requests_per_minute", sa.BigInteger()),
        sa.Column("tokens_per_day", sa.BigInteger()),
    )
    op.create_table(
        "key_usage",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "servables",
        sa.Column("version", sa.String(160), primary_key=True),
        sa.Column("engine", sa.String(63), primary_key=True),
        sa.Column("model_name", sa.String(200), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("adapter_path", sa.Text()),
        sa.Column("adapter_sha256", sa.String(64)),
        sa.Column("base_revision", sa.String(128)),
        sa.Column("template_digest", sa.String(64)),
        sa.Column("prompt_digest", sa.String(64)),
        sa.Column("alias", sa.String(256)),
        sa.Column("tenant", sa.String(63)),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "servable_replicas",
        sa.Column("engine", sa.String(63), primary_key=True),
        sa.Column("replica_id", sa.String(64), primary_key=True),
        sa.Column("version", sa.String(160), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("heartbeat_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "router_replicas",
        sa.Column("replica_id", sa.String(64), primary_key=True),
        sa.Column("revisions", sa.JSON(), nullable=False),
        sa.Column("heartbeat_us", sa.BigInteger(), nullable=False),
    )


def _create_experiments() -> None:
    op.create_table(
        "experiments",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("workspace", sa.String(63), nullable=False),
        sa.Column("agent", sa.String(128), nullable=False),
        sa.Column("modality", sa.String(16), nullable=False),
        sa.Column("layer", sa.String(128), nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("stable", sa.String(160), nullable=False),
        sa.Column("candidate", sa.String(160), nullable=False),
        sa.Column("bucket_low", sa.Double(), nullable=False),
        sa.Column("bucket_high", sa.Double(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("outcome", sa.String(32)),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("ended_at_us", sa.BigInteger()),
    )
    op.create_table(
        "experiment_users",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("user_id", sa.String(128), primary_key=True),
        sa.Column("arm", sa.String(16), nullable=False),
        sa.Column("bucket", sa.Double(), nullable=False),
        sa.Column("excluded", sa.Boolean(), nullable=False),
        sa.Column("segments", sa.JSON(), nullable=False),
        sa.Column("covariates", sa.JSON(), nullable=False),
        sa.Column("first_seen_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "experiment_arms",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("share", sa.Double(), primary_key=True),
        sa.Column("arm", sa.String(16), primary_key=True),
        sa.Column("users", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "arm_statistics",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("user_id", sa.String(128), primary_key=True),
        sa.Column("period", sa.String(16), primary_key=True),
        sa.Column("arm", sa.String(16), primary_key=True),
        sa.Column("sums", sa.Text(), nullable=False),
    )
    op.create_table(
        "rollouts",
        sa.Column("rollout_id", sa.String(64), primary_key=True),
        sa.Column("experiment_id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("agent", sa.String(128), nullable=False),
        sa.Column("modality", sa.String(16), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("stage_started_us", sa.BigInteger(), nullable=False),
        sa.Column("holding_since_us", sa.BigInteger()),
        sa.Column("approved_stage", sa.Integer()),
        sa.Column("decisions", sa.Integer(), nullable=False),
        sa.Column("pending_decision", sa.JSON()),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
    )


def _create_moments() -> None:
    op.create_table(
        "arm_moments",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("segment", sa.String(160), primary_key=True),
        sa.Column("period", sa.String(16), primary_key=True),
        sa.Column("metric", sa.String(80), primary_key=True),
        sa.Column("arm", sa.String(16), primary_key=True),
        sa.Column("users", sa.Double(), nullable=False),
        sa.Column("sum_n", sa.Double(), nullable=False),
        sa.Column("sum_y", sa.Double(), nullable=False),
        sa.Column("sum_nn", sa.Double(), nullable=False),
        sa.Column("sum_ny", sa.Double(), nullable=False),
        sa.Column("sum_yy", sa.Double(), nullable=False),
        sa.Column("sum_m", sa.Double(), nullable=False),
        sa.Column("sum_mm", sa.Double(), nullable=False),
        sa.Column("known", sa.Double(), nullable=False),
        sa.Column("sum_x", sa.Double(), nullable=False),
        sa.Column("sum_xx", sa.Double(), nullable=False),
        sa.Column("sum_m_known", sa.Double(), nullable=False),
        sa.Column("sum_xm", sa.Double(), nullable=False),
    )
    op.create_table(
        "arm_history",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("period", sa.String(16), primary_key=True),
        sa.Column("at_us", sa.BigInteger(), primary_key=True),
        sa.Column("metric", sa.String(80), primary_key=True),
        sa.Column("arm", sa.String(16), primary_key=True),
        sa.Column("users", sa.Double(), nullable=False),
        sa.Column("sum_n", sa.Double(), nullable=False),
        sa.Column("sum_y", sa.Double(), nullable=False),
        sa.Column("sum_nn", sa.Double(), nullable=False),
        sa.Column("sum_ny", sa.Double(), nullable=False),
        sa.Column("sum_yy", sa.Double(), nullable=False),
        sa.Column("sum_m", sa.Double(), nullable=False),
        sa.Column("sum_mm", sa.Double(), nullable=False),
        sa.Column("known", sa.Double(), nullable=False),
        sa.Column("sum_x", sa.Double(), nullable=False),
        sa.Column("sum_xx", sa.Double(), nullable=False),
        sa.Column("sum_m_known", sa.Double(), nullable=False),
        sa.Column("sum_xm", sa.Double(), nullable=False),
    )
    op.create_table(
        "arm_histograms",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("metric", sa.String(80), primary_key=True),
        sa.Column("period", sa.String(16), primary_key=True),
        sa.Column("arm", sa.String(16), primary_key=True),
        sa.Column("bin", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("count", sa.Double(), nullable=False),
    )
    op.create_table(
        "user_baselines",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("agent", sa.String(128), primary_key=True),
        sa.Column("metric", sa.String(80), primary_key=True),
        sa.Column("user_id", sa.String(128), primary_key=True),
        sa.Column("count", sa.Double(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
    )


def _create_jobs() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("holder", sa.String(128), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "outlets",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("delivered", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("retry_at_us", sa.BigInteger(), nullable=False),
        sa.Column("failure", sa.Text()),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "dead_letters",
        sa.Column("outlet", sa.String(63), primary_key=True),
        sa.Column("seq", Sequence64, primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("died_at_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "training_jobs",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("workspace", sa.String(63), nullable=False),
        sa.Column("agent", sa.String(128)),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("dataset_id", sa.String(128)),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("progress", sa.JSON()),
        sa.Column("retries", sa.Integer(), nullable=False),
        sa.Column("output_version", sa.String(160)),
        sa.Column("error", sa.Text()),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("started_at_us", sa.BigInteger()),
        sa.Column("finished_at_us", sa.BigInteger()),
        sa.Column("used_s", sa.Double(), nullable=False),
        sa.Column("gpus", sa.Double(), nullable=False),
        sa.Column("used_gpu_s", sa.Double(), nullable=False),
        sa.Column("request", sa.JSON()),
        sa.Column("runner", sa.JSON()),
        sa.Column("stopping", sa.Boolean(), nullable=False),
        sa.Column("fine_tuned_model", sa.String(256)),
    )
    op.create_index("training_jobs_by_state", "training_jobs", ["state", "created_at_us"])
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON()),
    )
    op.create_table(
        "uploaded_files",
        sa.Column("file_id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("workspace", sa.String(63), nullable=False),
        sa.Column("filename", sa.String(256), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("format", sa.String(16)),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
    )
    op.create_index("uploaded_files_by_tenant", "uploaded_files", ["tenant", "created_at_us"])


def _create_services() -> None:
    op.create_table(
        "judged_answers",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("grader_version", sa.String(64), nullable=False),
        sa.Column("reward", sa.Double(), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("judged_at_us", sa.BigInteger(), nullable=False),
    )
    op.create_index("judged_answers_by_age", "judged_answers", ["judged_at_us"])
    op.create_table(
        "tool_replies",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("workspace", sa.String(63), primary_key=True),
        sa.Column("tool", sa.String(64), primary_key=True),
        sa.Column("idempotency_key", sa.String(128), primary_key=True),
        sa.Column("arguments_digest", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reply", sa.JSON()),
        sa.Column("begun_at_us", sa.BigInteger(), nullable=False),
    )
    op.create_index("tool_replies_by_age", "tool_replies", ["begun_at_us"])


TABLES = (
    "events",
    "event_bodies",
    "event_ids",
    "cursors",
    "partitions",
    "erasures",
    "tombstones",
    "routes",
    "router_configs",
    "agent_prompts",
    "api_keys",
    "key_usage",
    "servables",
    "servable_replicas",
    "router_replicas",
    "experiments",
    "experiment_users",
    "experiment_arms",
    "arm_statistics",
    "arm_moments",
    "arm_history",
    "arm_histograms",
    "user_baselines",
    "rollouts",
    "leases",
    "outlets",
    "dead_letters",
    "judged_answers",
    "tool_replies",
    "training_jobs",
    "job_events",
    "uploaded_files",
)
