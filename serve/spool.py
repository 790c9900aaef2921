"""A router's events while the log takes none: its own files, and those that dead routers left in the same folder."""

import logging
import socket
from dataclasses import asdict
from pathlib import Path

import orjson

from cluster import metrics
from data.events import Event, uuid7
from data.spool import FOLDER, SpoolFile, spool_files

log = logging.getLogger(__name__)


class Spool:
    """Takes events down and gives them back, oldest file first. For one thread; a disk that fails loses, never raises.

    `limit`: bytes of this router's own file.
    """

    def __init__(self, home: Path, limit: int) -> None:
        self.folder = home / FOLDER
        self._home, self._limit = home, limit
        self._own: SpoolFile | None = None
        self._left: list[SpoolFile] = []
        self._read: tuple[SpoolFile, int] | None = None

    @property
    def size(self) -> int:
        """Bytes that are not in the log yet."""
        return sum(file.waiting for file in self._files)

    @property
    def _files(self) -> list[SpoolFile]:
        return self._left if self._own is None else [*self._left, self._own]

    def adopt(self) -> None:
        """Take over what nobody holds: its router is dead. If this one dies too, its locks end and the next takes over.

        Events whose file was not removed in time come twice, which their ids make harmless.
        """
        held = {file.path for file in self._files}
        for path in spool_files(self._home):
            try:
                claimed = SpoolFile.claim(path) if path not in held else None
            except OSError as error:
                log.error("the spool %s cannot be taken over (%s)", path, error)
                continue
            if claimed is not None:
                self._left.append(claimed)
        self._measure()

    def add(self, events: list[Event]) -> int:
        """Write events down, durably; returns how many found room."""
        lines = [line for event in events if (line := _line_of(event)) is not None]
        kept, room = 0, self._limit - (self._own.waiting if self._own is not None else 0)
        while kept < len(lines) and len(lines[kept]) <= room:
            room -= len(lines[kept])
            kept += 1
        if not kept:
            return 0
        try:
            if self._own is None:
                self._own = SpoolFile.create(self.folder / f"router-{socket.gethostname()}-{uuid7()}.jsonl")
            self._own.add(lines[:kept])
        except OSError as error:
            log.error("the spool in %s cannot be written (%s)", self.folder, error)
            return 0
        self._measure()
        return kept

    def read(self, limit: int) -> list[Event]:
        """The oldest events; `forget` says that they are home. A file that cannot be read is put back."""
        self._read = None
        for file in self._files:
            try:
                lines, end = file.read(limit)
            except OSError as error:
                log.error("the spool %s cannot be read (%s); it is tried again later", file.path, error)
                self._drop(file)
                file.close()
                continue
            events = [event for _, event in lines if event is not None]
            metrics.CAPTURED.labels("lost").inc(len(lines) - len(events))
            self._read = file, end
            return events
        return []

    def forget(self) -> None:
        """What was read last is home."""
        if self._read is None:
            return
        file, end = self._read
        self._read = None
        file.forget(end)
        if file.waiting <= 0:
            self._drop(file)
            try:
                file.remove()
            except OSError as error:
                log.error("the spool %s is home but cannot be removed (%s)", file.path, error)
        self._measure()

    def close(self) -> None:
        """Let the files go, for the next router."""
        for file in self._files:
            file.close()
        self._own, self._left = None, []

    def _drop(self, file: SpoolFile) -> None:
        self._left = [left for left in self._left if left is not file]
        if file is self._own:
            self._own = None

    def _measure(self) -> None:
        metrics.SPOOL_BYTES.set(self.size)


def _line_of(event: Event) -> bytes | None:
    try:
        return orjson.dumps(asdict(event)) + b"\n"
    except TypeError as error:  # nested deeper than JSON can be written
        log.error("interaction %s cannot be written (%s)", event.interaction_id, error)
        return None
