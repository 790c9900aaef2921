"""Many rows into one table, quickly, inside the caller's transaction, on either database.

PostgreSQL takes them as a binary COPY. SQLite takes a few long `INSERT … VALUES (…), (…)`: one call into
SQLite a statement, so the interpreter's lock is let go once a few hundred rows and not once a row (an
`executemany` beside a busy thread waits up to five milliseconds for the lock at every row).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection

LONGEST_INSERT = 256
"""Rows in the longest SQLite statement; shorter ones halve, so each table has nine cached statements."""

COPY_TYPES: dict[type[Any], str] = {
    sa.BigInteger: "int8",
    sa.Integer: "int4",
    sa.Double: "float8",
    sa.String: "varchar",
    sa.Text: "text",
    sa.LargeBinary: "bytea",
    sa.Boolean: "bool",
}


def insert_rows(connection: Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert `rows`, each a tuple of values in the order of the table's columns.

    Raises:
        sqlalchemy.exc.IntegrityError: a row breaks a constraint.
    """
    if connection.dialect.name == "postgresql":
        _copy(connection, table, rows)
    else:
        _insert_values(connection, table, rows)


def merge_rows(
    connection: Connection,
    table: sa.Table,
    rows: Sequence[tuple[Any, ...]],
    *,
    add: Sequence[str] = (),
    latest: Sequence[str] = (),
) -> None:
    """Insert `rows`, whose keys differ; where one is there already, its other columns are replaced.

    Columns in `add` are added to what is there, those in `latest` keep the greater value.
    """
    if not rows:
        return
    rows = _encoded(table, rows)
    if connection.dialect.name == "postgresql":
        types = [_array_type(column) for column in table.columns]
        names = ", ".join(column.name for column in table.columns)
        arrays = ", ".join(f"%s::{kind}[]" for kind in types)
        statement = f"INSERT INTO {table.name} ({names}) SELECT * FROM unnest({arrays})"
        columns = tuple(list(column) for column in zip(*rows, strict=True))
        connection.exec_driver_sql(statement + _on_conflict(table, tuple(add), tuple(latest)), columns)
    else:
        _insert_values(connection, table, rows, _on_conflict(table, tuple(add), tuple(latest)))


def _encoded(table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """The rows with JSON columns as text."""
    places = [number for number, column in enumerate(table.columns) if isinstance(column.type, sa.JSON)]
    if not places:
        return rows
    changed = [list(row) for row in rows]
    for row in changed:
        for place in places:
            row[place] = orjson.dumps(row[place]).decode()
    return [tuple(row) for row in changed]


@lru_cache
def _on_conflict(table: sa.Table, add: tuple[str, ...], latest: tuple[str, ...]) -> str:
    """The clause; SQLite calls MAX what is GREATEST elsewhere, so both are spelled out."""
    changes = []
    for name in (column.name for column in table.columns if not column.primary_key):
        old, new = f"{table.name}.{name}", f"excluded.{name}"
        value = f"{old} + {new}" if name in add else new
        if name in latest:
            value = f"CASE WHEN {new} > {old} THEN {new} ELSE {old} END"
        changes.append(f"{name} = {value}")
    keys = ", ".join(column.name for column in table.primary_key)
    return f" ON CONFLICT ({keys}) DO UPDATE SET {', '.join(changes)}"


def _array_type(column: sa.Column[Any]) -> str:
    return "json" if isinstance(column.type, sa.JSON) else _copy_type(column)


@contextmanager
def driver_errors(connection: Connection, statement: str) -> Iterator[None]:
    """Around direct use of the driver: its errors become SQLAlchemy's, as everywhere else."""
    base: type[Exception] = connection.dialect.loaded_dbapi.Error
    try:
        yield
    except base as error:
        raise sa.exc.DBAPIError.instance(statement, None, error, base, dialect=connection.dialect) from error


def _copy(connection: Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
    driver: Any = connection.connection.driver_connection
    statement, types = _copy_statement(table)
    with driver_errors(connection, statement), driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)


@lru_cache
def _copy_statement(table: sa.Table) -> tuple[str, list[str]]:
    names = ", ".join(column.name for column in table.columns)
    return f"COPY {table.name} ({names}) FROM STDIN (FORMAT binary)", [_copy_type(c) for c in table.columns]


def _copy_type(column: sa.Column[Any]) -> str:
    return next(COPY_TYPES[kind] for kind in type(column.type).__mro__ if kind in COPY_TYPES)


def _insert_values(
    connection: Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]], on_conflict: str = ""
) -> None:
    start, size = 0, LONGEST_INSERT
    while start < len(rows):
        while size > len(rows) - start:
            size //= 2
        values = tuple(chain.from_iterable(rows[start : start + size]))
        connection.exec_driver_sql(_insert_statement(table, size, on_conflict), values)
        start += size


@lru_cache
def _insert_statement(table: sa.Table, size: int, on_conflict: str = "") -> str:
    names = ", ".join(column.name for column in table.columns)
    row = "(" + ", ".join("?" * len(table.columns)) + ")"
    return f"INSERT INTO {table.name} ({names}) VALUES " + ", ".join([row] * size) + on_conflict
