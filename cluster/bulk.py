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


def _insert_values(connection: Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
    start, size = 0, LONGEST_INSERT
    while start < len(rows):
        while size > len(rows) - start:
            size //= 2
        values = tuple(chain.from_iterable(rows[start : start + size]))
        connection.exec_driver_sql(_insert_statement(table, size), values)
        start += size


@lru_cache
def _insert_statement(table: sa.Table, size: int) -> str:
    names = ", ".join(column.name for column in table.columns)
    row = "(" + ", ".join("?" * len(table.columns)) + ")"
    return f"INSERT INTO {table.name} ({names}) VALUES " + ", ".join([row] * size)
