"""One database, SQLite or PostgreSQL, chosen by its URL; the same SQLAlchemy code and migrations for both."""

import fcntl
import logging
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.errors import ConfigError, ConflictError, UnavailableError
from cluster.schema import other_schema, require_schema
from cluster.settings import Settings

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK = 7_213_001  # pg_advisory_lock key: one process migrates at a time
SILENT_PEER = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000}
"""libpq: a server that vanishes without a word is an error after 15 to 25 s, not after the kernel's two hours."""
POLL_S = 0.05  # between two tries for a lock


def connect(settings: Settings, *, migrate: bool = True) -> Engine:
    """An engine on the configured database, its schema brought up to date.

    Raises:
        ConfigError: the URL is not one we speak, or the database not one that our migrations make.
        UnavailableError: the server does not answer or refuses us.
    """
    engine = _engine(settings)
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
        if migrate:
            upgrade(engine)
    except sa.exc.OperationalError as error:
        shown = engine.url.render_as_string(hide_password=True)
        cause = str(error.orig).strip().splitlines()[0]
        raise UnavailableError(
            f"database {shown} does not answer ({cause}); start it or set `database.url` in rayloop.yaml"
        ) from None
    return engine


def _engine(settings: Settings) -> Engine:
    try:
        url = sa.make_url(settings.database_url)
        backend = url.get_backend_name()
    except sa.exc.ArgumentError:
        backend = ""
    if backend == "sqlite":
        return _sqlite(url, settings)
    if backend == "postgresql":
        timeout = max(1, round(settings.database.connect_timeout_s))
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=settings.database.pool_size,
            max_overflow=settings.database.pool_size,
            pool_pre_ping=True,
            connect_args={"connect_timeout": timeout} | SILENT_PEER,
        )
    raise ConfigError(
        "database.url",
        settings.database_url,
        "must start with sqlite:/// or postgresql://",
        "set `database.url` in rayloop.yaml",
    )


def _sqlite(url: sa.URL, settings: Settings) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ConfigError("database.url", str(url), "must name a file", "write sqlite:///path/to/rayloop.db")
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"database {url} cannot be created ({error.strerror}); set `database.url` in rayloop.yaml"
        ) from None
    engine = sa.create_engine(
        url, connect_args={"timeout": settings.database.busy_timeout_s, "check_same_thread": False}
    )

    pragmas = (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
        f"cache_size=-{settings.database.sqlite_cache_mb * 1024}",
        f"wal_autocheckpoint={settings.database.sqlite_checkpoint_pages}",
    )

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
        connection.isolation_level = None  # type: ignore[attr-defined]  # we write BEGIN ourselves

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def write(engine: Engine) -> sa.engine.base.Engine:
    """The engine for transactions that write: on SQLite they take the write lock at once.

    A deferred transaction that reads first and writes later fails with `database is locked` when
    another process wrote in between; an immediate one waits its turn.
    """
    return engine.execution_options(sqlite_begin="IMMEDIATE")


def is_postgres(engine: Engine) -> bool:
    """True on PostgreSQL."""
    return engine.dialect.name == "postgresql"


def upgrade(engine: Engine) -> None:
    """Bring the schema to the newest migration; safe to call from many processes at once.

    Where it is there already, alembic is not even imported: every process connects, and few ever migrate.

    Raises:
        ConfigError: the database is not one that these migrations make.
    """
    if not is_current(engine):
        _migrate(engine)
    with engine.connect() as connection:
        require_schema(connection)


def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    with write(engine).begin() as connection:
        if is_postgres(engine):
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:  # a revision of a later Rayloop, or of another program
            raise other_schema(connection, f"is at a revision that is not known here ({error})") from None


def is_current(engine: Engine) -> bool:
    """True when the schema is the newest migration's; files are named for their revision."""
    newest = max(file.name.partition("_")[0] for file in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))
    try:
        with engine.connect() as connection:
            return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == newest
    except sa.exc.DBAPIError:
        return False  # no such table, or no answer, which the migration will tell of


@contextmanager
def exclusive(engine: Engine, name: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock of this database by name; it goes with the process, however that ends.

    Raises:
        ConflictError: another process holds it for longer than `wait_s`.
    """
    with (_advisory_lock if is_postgres(engine) else _file_lock)(engine, name) as take:
        deadline = time.monotonic() + wait_s
        while not take():
            if time.monotonic() >= deadline:
                raise ConflictError(f"another process holds the lock `{name}` of this database; try again later")
            time.sleep(POLL_S)
        yield


@contextmanager
def _advisory_lock(engine: Engine, name: str) -> Iterator[Any]:
    key = {"key": zlib.crc32(name.encode())}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        taken = False

        def take() -> bool:
            nonlocal taken
            taken = bool(connection.execute(sa.text("SELECT pg_try_advisory_lock(:key)"), key).scalar())
            return taken

        try:
            yield take
        finally:
            if taken:
                connection.execute(sa.text("SELECT pg_advisory_unlock(:key)"), key)


@contextmanager
def _file_lock(engine: Engine, name: str) -> Iterator[Any]:
    with open(f"{engine.url.database}.{name}.lock", "w") as file:

        def take() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        yield take
