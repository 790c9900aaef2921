"""Training jobs, what they report, and files that were uploaded for them."""

from sqlalchemy import JSON, BigInteger, Boolean, Column, Double, Index, Integer, String, Table, Text

from cluster.tables.schema import metadata

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
