"""The first schema. Frozen: a later change of `cluster/tables.py` is a new migration."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

Sequence64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create every table of the first release."""
    _create_log()
    _create_live_side()
    _create_experiments()
    _create_jobs()


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


def _create_live_side() -> None:
    op.create_table(
        "routes",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("agent", sa.String(128), primary_key=True),
        sa.Column("modality", sa.String(16), primary_key=True),
        sa.Column("stable", sa.String(160), nullable=False),
        sa.Column("candidate", sa.String(160)),
        sa.Column("share", sa.Double(), nullable=False),
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


def _create_experiments() -> None:
    op.create_table(
        "experiments",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("workspace", sa.String(63), nullable=False),
        sa.Column("agent", sa.String(128), nullable=False),
        sa.Column("modality", sa.String(16), nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("stable", sa.String(160), nullable=False),
        sa.Column("candidate", sa.String(160), nullable=False),
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
        sa.Column("first_arm", sa.String(16), nullable=False),
        sa.Column("first_share", sa.Double(), nullable=False),
        sa.Column("bucket", sa.Double(), nullable=False),
        sa.Column("excluded", sa.Boolean(), nullable=False),
        sa.Column("first_seen_us", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_us", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "arm_statistics",
        sa.Column("experiment_id", sa.String(64), primary_key=True),
        sa.Column("metric", sa.String(80), primary_key=True),
        sa.Column("period", sa.String(16), primary_key=True),
        sa.Column("arm", sa.String(16), primary_key=True),
        sa.Column("user_id", sa.String(128), primary_key=True),
        sa.Column("count", sa.Double(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
        sa.Column("total_squares", sa.Double(), nullable=False),
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


def _create_jobs() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("holder", sa.String(128), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=False),
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
    )
    op.create_index("training_jobs_by_state", "training_jobs", ["state", "created_at_us"])


TABLES = (
    "events",
    "event_bodies",
    "event_ids",
    "cursors",
    "routes",
    "api_keys",
    "servables",
    "servable_replicas",
    "experiments",
    "experiment_users",
    "arm_statistics",
    "rollouts",
    "leases",
    "training_jobs",
)
