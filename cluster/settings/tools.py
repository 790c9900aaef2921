"""The tool server (serving.md)."""

from pydantic import Field, field_validator

from cluster.settings.base import Section

EVENTS_VIEW = (
    "SELECT kind, agent, session_id, interaction_id, occurred_at_us FROM events "
    "WHERE tenant = :tenant AND workspace = :workspace AND NOT erased"
)


class ToolSettings(Section):
    """Tools that agents call over HTTP and MCP."""

    replicas: int = Field(1, ge=1)
    """Copies of the tool server."""
    cpus: float = Field(0.1, ge=0)
    """Logical CPUs each replica reserves."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Requests one replica works on at once; more are answered 429 at once."""
    modules: tuple[str, ...] = ()
    """Modules of your own, imported at start, whose functions `@tool` registers."""
    serve: tuple[str, ...] | None = None
    """Names of the tools to serve. `None`: all that are registered."""
    views: dict[str, str] = {"event_log": EVENTS_VIEW}
    """Views that `query_sql` may read, as SELECTs that may use `:tenant` and `:workspace`. Empty: no SQL."""
    sql_url: str | None = Field(None, repr=False)
    """SQLAlchemy URL of the database with the views. `None`: the installation's own. Give it a login that may
    only read."""
    deadline_s: float = Field(5.0, gt=0)
    """A tool that takes longer is answered for with 504; a tool may name its own."""
    max_result_bytes: int = Field(200_000, ge=1_000)
    """A longer result is refused; a tool may name its own."""
    max_rows: int = Field(1_000, ge=1)
    """Most rows of a query that come back."""
    max_running: int = Field(8, ge=1)
    """Calls of one tool at the same time, those given up at their deadline included; more are answered 503."""
    threads: int = Field(32, ge=1)
    """Threads in which tools run."""
    search_interactions: int = Field(2_000, ge=1, le=100_000)
    """How many of the newest interactions `search_interactions` reads."""
    max_body_bytes: int = Field(1_000_000, ge=1024)
    """Longer request bodies are answered 413 without being read to the end."""
    body_timeout_s: float = Field(30.0, gt=0)
    """How long a client may take to send its body."""
    retry_after_s: float = Field(1.0, gt=0)
    """What a refused client is told to wait."""
    keys_refresh_s: float = Field(1.0, gt=0, le=2.0)
    """How often the API keys are read; a revoked key stops working within this time."""
    replies_days: float = Field(7.0, gt=0)
    """How long a write's idempotency key is remembered."""

    @field_validator("views")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.isidentifier() or name != name.lower():
                raise ValueError(f"the view {name!r} must be named by an identifier in lower case")
        return value
