"""What runs beside the live side: leases, outlets, what judges and tools have said."""

from sqlalchemy import JSON, BigInteger, Column, Double, Index, Integer, String, Table, Text

from cluster.tables.schema import Sequence64, metadata

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
