"""The event log, the source of truth: events, cursors of its readers, sealed partitions, erasures."""

from sqlalchemy import JSON, BigInteger, Boolean, Column, Index, LargeBinary, String, Table, Text

from cluster.tables.schema import Sequence64, metadata

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
