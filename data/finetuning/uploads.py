"""Files that clients uploaded: bytes in a folder of their tenant, what is known of them in a table.

A file's bytes are whole before its row exists, and go after its row is gone, so a row never names a file that
is not there.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.errors import NotFoundError, OverloadedError, UnavailableError
from cluster.tables import uploaded_files

CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """One row of the table."""

    file_id: str
    tenant: str
    workspace: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    format: str | None
    """`chat`, `preference` or `item` (see `data.finetuning.rows`); `None` for results."""
    rows: int
    created_at_us: int


class Uploads:
    """The files of one tenant and workspace."""

    def __init__(self, engine: Engine, root: Path, tenant: str, workspace: str) -> None:
        self.engine, self.root, self.tenant, self.workspace = engine, root, tenant, workspace

    @contextmanager
    def draft(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A file to write an upload to; it goes again when the block ends unless `keep` took it.

        Raises:
            UnavailableError: the folder cannot be written.
        """
        path = self._folder / f".{uuid.uuid4().hex}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = path.open("wb")
        except OSError as error:
            raise UnavailableError(f"files cannot be stored in {self._folder} ({error.strerror})") from None
        try:
            with file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    def keep(
        self,
        draft: Path,
        filename: str,
        purpose: str,
        *,
        format: str | None,
        rows: int,
        file_id: str | None = None,
        max_files: int | None = None,
    ) -> StoredFile:
        """Give a complete draft an id, or the one named; a file of that id is replaced.

        Raises:
            OverloadedError: the tenant has as many files as it may.
        """
        if max_files is not None and self._count() >= max_files:
            raise OverloadedError(
                f"tenant {self.tenant!r} keeps {max_files} files, as many as it may; delete some", retry_after_s=60.0
            )
        stored = StoredFile(
            file_id=file_id or f"file-{uuid.uuid4().hex[:24]}",
            tenant=self.tenant,
            workspace=self.workspace,
            filename=filename[:256],
            purpose=purpose,
            bytes=draft.stat().st_size,
            sha256=_synced_digest(draft),
            format=format,
            rows=rows,
            created_at_us=now_us(),
        )
        os.replace(draft, self.path(stored))
        with write(self.engine).begin() as connection:
            connection.execute(uploaded_files.delete().where(self._is(stored.file_id)))
            connection.execute(uploaded_files.insert().values(vars(stored)))
        return stored

    def get(self, file_id: str) -> StoredFile:
        """One file.

        Raises:
            NotFoundError: this tenant has none of this id.
        """
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(uploaded_files).where(self._mine(), self._is(file_id))).mappings()
            found = row.first()
        if found is None:
            raise NotFoundError(f"no file {file_id!r}")
        return StoredFile(**found)

    def list(self, *, purpose: str | None, after: str | None, limit: int, newest_first: bool) -> list[StoredFile]:
        """Files in the order of their making, after the one named.

        Raises:
            NotFoundError: `after` names none.
        """
        f = uploaded_files.c
        query = sa.select(uploaded_files).where(self._mine())
        if purpose is not None:
            query = query.where(f.purpose == purpose)
        if after is not None:
            last = self.get(after)
            place, here = sa.tuple_(f.created_at_us, f.file_id), (last.created_at_us, last.file_id)
            query = query.where(place < here if newest_first else place > here)
        order = (f.created_at_us.desc(), f.file_id.desc()) if newest_first else (f.created_at_us, f.file_id)
        with self.engine.connect() as connection:
            return [StoredFile(**row) for row in connection.execute(query.order_by(*order).limit(limit)).mappings()]

    def delete(self, file_id: str) -> None:
        """Forget a file, its bytes too.

        Raises:
            NotFoundError: this tenant has none of this id.
        """
        stored = self.get(file_id)
        with write(self.engine).begin() as connection:
            connection.execute(uploaded_files.delete().where(self._mine(), self._is(file_id)))
        with contextlib.suppress(FileNotFoundError):
            self.path(stored).unlink()

    def path(self, stored: StoredFile) -> Path:
        """Where its bytes are."""
        return self._folder / stored.file_id

    @property
    def _folder(self) -> Path:
        return self.root / self.tenant

    def _count(self) -> int:
        query = sa.select(sa.func.count()).select_from(uploaded_files).where(uploaded_files.c.tenant == self.tenant)
        with self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def _mine(self) -> sa.ColumnElement[bool]:
        return (uploaded_files.c.tenant == self.tenant) & (uploaded_files.c.workspace == self.workspace)

    def _is(self, file_id: str) -> sa.ColumnElement[bool]:
        return uploaded_files.c.file_id == file_id


def _synced_digest(path: Path) -> str:
    """SHA-256 of a file, after its bytes have reached the disk."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()
