"""`tests.data.appender` on a SQLite that does not wait for the disk: what a loss of power must be seen to lose."""

import sqlite3
import sys

import sqlalchemy as sa
from sqlalchemy.pool import Pool

from tests.data.appender import main


@sa.event.listens_for(Pool, "checkout")
def _careless(connection: sqlite3.Connection, _record: object, _proxy: object) -> None:
    connection.execute("PRAGMA synchronous=OFF")


if __name__ == "__main__":
    main(*sys.argv[1:])
