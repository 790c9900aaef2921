"""What the live side should do, who may ask it, and what its replicas report."""

from sqlalchemy import JSON, BigInteger, Boolean, Column, Double, Integer, String, Table, Text

from cluster.tables.schema import metadata

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
agent_prompts = Table(
    "agent_prompts",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("agent", String(128), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # the highest is in force
    Column("digest", String(64), nullable=False),
    Column("system", Text, nullable=False),
    Column("refusals", JSON, nullable=False),  # in order: rule, cases
    Column("created_at_us", BigInteger, nullable=False),
    Column("created_by", String(128), nullable=False),
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
    Column("prompt_digest", String(64)),
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
