"""Is a database's schema the one that this code was written for?

The revision in a database says which migrations ran, not what they said when they ran: a migration that was edited
afterwards leaves a database that is current by name and lacks what the code asks for. So the columns themselves are
compared, in one query: names, whether they may be empty, and which are the primary key. Types and indexes are not.
"""

from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.errors import ConfigError
from cluster.tables import metadata

SHOWN = 3
"""Differences that are named; the rest are counted."""
REMEDY = "move it away, or set `database.url` in rayloop.yaml to an empty database"

COLUMNS = {
    "sqlite": sa.text(
        'SELECT t.name, c.name, c."notnull" > 0, c.pk > 0 FROM sqlite_master t, pragma_table_info(t.name) c '
        "WHERE t.type = 'table'"
    ),
    "postgresql": sa.text(
        "SELECT t.relname, c.attname, c.attnotnull, c.attnum = ANY(coalesce(k.indkey, '')) "
        "FROM pg_class t JOIN pg_attribute c ON c.attrelid = t.oid "
        "LEFT JOIN pg_index k ON k.indrelid = t.oid AND k.indisprimary "
        "WHERE t.relkind = 'r' AND t.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema()) "
        "AND c.attnum > 0 AND NOT c.attisdropped"
    ),
}
"""By dialect: table, column, whether it must be filled, whether it is of the primary key."""

Columns = dict[str, tuple[bool, bool]]


def require_schema(connection: Connection) -> None:
    """Refuse a database that another edit of the migrations made.

    Raises:
        ConfigError: a table or column is missing, too much, or of another shape.
    """
    found = list(_differences(_present(connection)))
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        rule = f"was made by another edit of Rayloop's migrations ({', '.join(found[:SHOWN])}{more})"
        raise other_schema(connection, rule)


def other_schema(connection: Connection, rule: str) -> ConfigError:
    """The error of a database that is not ours, or not as ours are."""
    shown = connection.engine.url.render_as_string(hide_password=True)
    return ConfigError("database.url", shown, rule, REMEDY)


def _present(connection: Connection) -> dict[str, Columns]:
    tables: dict[str, Columns] = {}
    for table, column, filled, key in connection.execute(COLUMNS[connection.dialect.name]):
        tables.setdefault(table, {})[column] = (bool(filled), bool(key))
    return tables


def _differences(present: dict[str, Columns]) -> Iterator[str]:
    """What is wrong with our tables, in words; tables of others are none of our business."""
    for name, table in metadata.tables.items():
        if name not in present:
            yield f"no table {name}"
            continue
        wanted = {column.name: (not column.nullable, column.primary_key) for column in table.columns}
        found = present[name]
        yield from (f"no column {name}.{column}" for column in wanted if column not in found)
        yield from (f"a column {name}.{column} too much" for column in found if column not in wanted)
        yield from (f"another {name}.{c}" for c in wanted if c in found and wanted[c] != found[c])
