"""Takes deleted bytes off the disk: a database keeps them in pages and in its write-ahead log until something else is
written there.

PostgreSQL's log is a row of segments. At a checkpoint those that are needed no more are removed or put aside under a
name to come, with what is in them, until the server reaches that name. So they are written over at once: a segment that
is ended is filled with zeros, and ending as many as were put aside reaches each of them.
"""

import time
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.database import POLL_S, is_postgres
from cluster.errors import UnavailableError


def remove_traces(engine: Engine, tables: Sequence[str], wait_s: float, overwrite_bytes: int) -> str:
    """See that no page and no write-ahead log keeps what was deleted.

    SQLite overwrites what is deleted (`secure_delete`), so its log is emptied into the file. PostgreSQL
    leaves deleted rows in their pages: `tables` are rewritten, which locks each for as long as that takes, and its
    write-ahead log is written over as far as the role may do that, at most `overwrite_bytes`; archives and backups age
    by the server's settings. Returns what became of the write-ahead log, for people.

    Raises:
        UnavailableError: within `wait_s`, readers of SQLite do not let go of its log, or transactions of
            PostgreSQL that may still see what was deleted do not end.
    """
    deadline = time.monotonic() + wait_s
    if is_postgres(engine):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            _rewrite(connection, tables, deadline)
            try:
                return _overwrite_log(connection, overwrite_bytes)
            except sa.exc.ProgrammingError as error:  # the role lacks a right
                cause = str(error.orig).splitlines()[0]
                return f"left to the server, which overwrites it as it goes on ({cause}; see docs/erasure.md)"
    while not _empty_write_ahead_log(engine):
        if time.monotonic() >= deadline:
            raise UnavailableError(
                f"the write-ahead log of {engine.url.database} is held by a reader and keeps deleted bytes; try again"
            )
        time.sleep(POLL_S)
    return "emptied"


def _rewrite(connection: Connection, tables: Sequence[str], deadline: float) -> None:
    if not tables:
        return
    _wait_for_older_snapshots(connection, deadline)
    for table in tables:
        connection.execute(sa.text(f"VACUUM (FULL, ANALYZE) {table}"))
    # the planner's statistics quote common values; a role that may not do this gets a warning
    _wait_for_older_snapshots(connection, deadline)
    connection.execute(sa.text("VACUUM FULL pg_catalog.pg_statistic"))


def _overwrite_log(connection: Connection, most_bytes: int) -> str:
    """End the current segment, have the server let go of those before, and write over those that it put aside."""
    last = _scalar(connection, "SELECT pg_walfile_name(pg_switch_wal())")
    connection.execute(sa.text("CHECKPOINT"))
    aside = _segments(connection, "name > pg_walfile_name(pg_current_wal_insert_lsn())")
    size = int(_scalar(connection, "SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'"))
    reached = aside[: most_bytes // size]
    while reached and _scalar(connection, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())") <= reached[-1]:
        connection.execute(sa.text("SELECT pg_logical_emit_message(false, 'rayloop', '')"))
        connection.execute(sa.text("SELECT pg_switch_wal()"))
    kept = _segments(connection, "name <= :last", last=last)
    return _said(len(reached), len(aside) - len(reached), len(kept))


def _said(overwritten: int, aside: int, kept: int) -> str:
    """What became of the segments."""
    text = f"ended, and {overwritten} segments that the server had put aside written over"
    if aside:
        text += f"; {aside} more wait to be reused, beyond erasure.overwrite_wal_mb"
    if kept:
        text += f"; {kept} from before are held by the server (a replica, a slot, archiving, wal_keep_size)"
    return text


def _segments(connection: Connection, condition: str, **values: str) -> list[str]:
    """Names of segments of the log, in order."""
    query = sa.text(f"SELECT name FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{{24}}$' AND {condition} ORDER BY name")
    return list(connection.execute(query, values).scalars())


def _scalar(connection: Connection, query: str) -> str:
    return str(connection.execute(sa.text(query)).scalar_one())


OLDER_SNAPSHOTS = sa.text(
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND age(backend_xmin) > age(CAST(CAST(:now AS text) AS xid))"
)


def _wait_for_older_snapshots(connection: sa.Connection, deadline: float) -> None:
    """Return when nobody sees the database as it was before this call: for them a rewrite would keep what is gone."""
    now = connection.execute(sa.text("SELECT pg_snapshot_xmax(pg_current_snapshot())::xid::text")).scalar()
    while pids := connection.execute(OLDER_SNAPSHOTS, {"now": now}).scalars().all():
        if time.monotonic() >= deadline:
            shown = ", ".join(map(str, pids))
            raise UnavailableError(f"open transactions (process {shown} of PostgreSQL) keep deleted rows; try again")
        time.sleep(POLL_S)


def _empty_write_ahead_log(engine: Engine) -> bool:
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (busy, *_) = cursor.fetchall()[0]
        cursor.close()
        return not busy
    finally:
        connection.close()
