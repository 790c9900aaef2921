"""Experiments and rollouts, with the sums that their readings are made of."""

from sqlalchemy import JSON, BigInteger, Boolean, Column, Double, Integer, String, Table, Text

from cluster.tables.schema import metadata

MOMENT_COLUMNS = (
    "users", "sum_n", "sum_y", "sum_nn", "sum_ny", "sum_yy", "sum_m", "sum_mm",
    "known", "sum_x", "sum_xx", "sum_m_known", "sum_xm",
)  # fmt: skip
"""Sums over the users of one arm; `serve.experiments.comparisons.Moments` says what each is."""

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
