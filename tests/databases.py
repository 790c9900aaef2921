"""Databases that have the newest schema already: a migration takes longer than many a test that needs one."""

import functools
import tempfile
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psycopg
import sqlalchemy as sa

from cluster.database import connect
from cluster.settings import Settings, load_settings

CONNECT_TIMEOUT_S = 3
SPARE = 2
"""Databases that wait for a test."""


@functools.cache
def _migrated_sqlite() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        connect(load_settings(home=Path(folder))[0]).dispose()
        return (Path(folder) / "rayloop.db").read_bytes()


def place_sqlite(file: Path) -> None:
    """An empty database with the newest schema, where there is none yet."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_migrated_sqlite())


def place_database(settings: Settings) -> None:
    """The same at the place that the settings name, if that is a file."""
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        place_sqlite(Path(str(url.database)))


class PostgresCopies:
    """Databases of one server, copied from one that is migrated.

    The next ones are made while a test runs, and those of tests that ended are dropped beside the others: PostgreSQL
    takes tenths of a second for either.
    """

    def __init__(self, server: str) -> None:
        self._server = sa.make_url(server)
        self._template = _fresh_name()
        self._run(f"CREATE DATABASE {self._template}")
        connect(load_settings(database={"url": self.url(self._template)})[0]).dispose()
        self._maker, self._dropper = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._made = deque(self._maker.submit(self._copy) for _ in range(SPARE))
        self._drops: list[Future[None]] = []

    def url(self, name: str) -> str:
        """Where a database of this server is."""
        return self._server.set(database=name).render_as_string(hide_password=False)

    def take(self) -> str:
        """The name of one that nobody had."""
        self._made.append(self._maker.submit(self._copy))
        return self._made.popleft().result()

    def drop(self, name: str) -> None:
        """Remove it soon."""
        self._drops.append(self._dropper.submit(self._run, f"DROP DATABASE {name} WITH (FORCE)"))

    def close(self) -> None:
        """Remove all that is left."""
        for name in [*(made.result() for made in self._made), self._template]:
            self.drop(name)
        self._maker.shutdown()
        self._dropper.shutdown()
        for dropped in self._drops:
            dropped.result()

    def _copy(self) -> str:
        name = _fresh_name()
        self._run(f"CREATE DATABASE {name} TEMPLATE {self._template}")
        return name

    def _run(self, statement: str) -> None:
        url = self._server.render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S) as connection:
            connection.execute(statement)


def _fresh_name() -> str:
    return f"rayloop_test_{uuid.uuid4().hex[:12]}"
