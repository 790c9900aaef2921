"""Databases that have the newest schema already: a migration takes longer than many a test that needs one."""

import functools
import tempfile
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psycopg
import sqlalchemy as sa

from cluster.database import connect
from cluster.settings import Settings, load_settings


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

    The next is made while a test runs, and those of tests that ended are dropped beside the others.
    """

    def __init__(self, server: str) -> None:
        self._server = sa.make_url(server)
        self._admin = psycopg.connect(server, autocommit=True, connect_timeout=3)
        self._worker = ThreadPoolExecutor(1)
        self._template = _fresh_name()
        self._admin.execute(f"CREATE DATABASE {self._template}")
        connect(load_settings(database={"url": self.url(self._template)})[0]).dispose()
        self._next = self._worker.submit(self._copy)
        self._drops: list[Future[None]] = []

    def url(self, name: str) -> str:
        """Where a database of this server is."""
        return self._server.set(database=name).render_as_string(hide_password=False)

    def take(self) -> str:
        """The name of one that nobody had."""
        name = self._next.result()
        self._next = self._worker.submit(self._copy)
        return name

    def drop(self, name: str) -> None:
        """Remove it soon."""
        self._drops.append(self._worker.submit(self._drop, name))

    def close(self) -> None:
        """Remove all that is left."""
        self.drop(self._next.result())
        self.drop(self._template)
        self._worker.shutdown()
        self._admin.close()
        for dropped in self._drops:
            dropped.result()

    def _copy(self) -> str:
        name = _fresh_name()
        self._admin.execute(f"CREATE DATABASE {name} TEMPLATE {self._template}")
        return name

    def _drop(self, name: str) -> None:
        self._admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _fresh_name() -> str:
    return f"rayloop_test_{uuid.uuid4().hex[:12]}"
