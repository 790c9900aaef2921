"""Rows of any SQL table or query that SQLAlchemy has a driver for, read only and in a stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.errors import InputError, UnavailableError
from data.importers.source import ForeignKey, Source
from data.rows import Row, plain_row

FETCHED_ROWS = 1000


def sql_sources(url: str, table: str | None, query: str | None) -> list[Source]:
    """A query, a table (`name` or `schema.name`), or all tables and views of the default schema.

    Raises:
        InputError: a URL that is none, a missing driver, or no such table.
        UnavailableError: the database does not answer.
    """
    engine = _engine(url)
    if query is not None:
        return [Source("query", lambda: _rows(engine, query), lambda: 0)]
    with _answering(engine) as connection:
        inspector = sa.inspect(connection)
        names = [*inspector.get_table_names(), *inspector.get_view_names()]
        if table is None:
            return [_table_source(engine, inspector, name, None) for name in sorted(names)]
        schema, _, name = table.rpartition(".")
        if not inspector.has_table(name, schema=schema or None):
            known = ", ".join(sorted(names)) or "none"
            raise InputError("table", table, f"does not exist; there are: {known}", "name one of them")
        return [_table_source(engine, inspector, name, schema or None)]


def _table_source(engine: Engine, inspector: Any, name: str, schema: str | None) -> Source:
    table = sa.table(name, schema=schema)
    columns: list[sa.ColumnClause[Any]] = [
        sa.column(column["name"]) for column in inspector.get_columns(name, schema=schema)
    ]
    statement = sa.select(*columns).select_from(table)
    keys = tuple(
        ForeignKey(column, key["referred_table"], other)
        for key in inspector.get_foreign_keys(name, schema=schema)
        for column, other in zip(key["constrained_columns"], key["referred_columns"], strict=False)
    )
    return Source(name, lambda: _rows(engine, statement), lambda: _count(engine, table), keys)


def _count(engine: Engine, table: Any) -> int:
    with _answering(engine) as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def _rows(engine: Engine, statement: Any) -> Iterator[Row]:
    """Rows of a statement; one in text goes to the driver as it is, so its `:` and `%` are no parameters."""
    with _answering(engine) as connection:
        streamed = connection.execution_options(yield_per=FETCHED_ROWS, no_parameters=isinstance(statement, str))
        result = streamed.exec_driver_sql(statement) if isinstance(statement, str) else streamed.execute(statement)
        for number, row in enumerate(result.mappings(), 1):
            yield plain_row(number, dict(row))


def _engine(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(parsed, poolclass=sa.NullPool)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError) as error:
        rule = f"is no URL of a database this machine can read ({str(error).splitlines()[0]})"
        remedy = "write dialect+driver://user:password@host/name, and install the driver"
        raise InputError("source", _without_password(url), rule, remedy) from None
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _forgiving)
    return engine


def _forgiving(connection: Any, _record: Any) -> None:
    """On SQLite, text that is not UTF-8 comes as bytes, so that one row is refused and not the table."""
    connection.text_factory = _text
    connection.execute("PRAGMA query_only = ON")


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


@contextmanager
def _answering(engine: Engine) -> Iterator[Connection]:
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.text("SET TRANSACTION READ ONLY"))
            yield connection
    except (sa.exc.ProgrammingError, sa.exc.OperationalError, sa.exc.InternalError) as error:
        cause = str(error.orig).strip().splitlines()[0]
        if error.connection_invalidated or error.statement is None:
            place = engine.url.render_as_string(hide_password=True)
            raise UnavailableError(f"{place} does not answer ({cause}); start it, or mend the URL") from None
        raise InputError("query", error.statement, f"fails ({cause})", "mend the query") from None


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
