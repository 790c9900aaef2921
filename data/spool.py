"""Files of events that wait for the log, in a folder that several machines may share.

Whoever writes or brings home a file holds a lock on it (`flock`), which ends with the process, wherever it runs: a
file that can be locked was left behind. Numbers of processes would not tell, as pods have the same ones.
"""

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from data.events import Event

FOLDER = "spool"
"""Below `home`."""
PATTERN = "router-*.jsonl"


class SpoolFile:
    """One file of JSON lines, an event each, that this process holds. Every method may raise `OSError`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._done, self._end = 0, os.fstat(descriptor).st_size

    @staticmethod
    def create(path: Path) -> "SpoolFile":
        """An empty file, which has its name only once it is locked."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.rename(path)
        except BaseException:
            os.close(descriptor)
            raise
        return SpoolFile(path, descriptor)

    @staticmethod
    def claim(path: Path) -> "SpoolFile | None":
        """A file that nobody holds; `None` for one that somebody does, or that has gone."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # not what somebody has just replaced
                return SpoolFile(path, descriptor)
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    @property
    def waiting(self) -> int:
        """Bytes that are not home."""
        return self._end - self._done

    def add(self, lines: Sequence[bytes]) -> None:
        """Write lines down, durably; all or none."""
        data, sent = memoryview(b"".join(lines)), 0
        try:
            while sent < len(data):
                sent += os.pwrite(self._descriptor, data[sent:], self._end + sent)
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(data)

    def read(self, limit: int) -> tuple[list[tuple[bytes, Event | None]], int]:
        """The oldest lines that wait, at most `limit`, as `parsed` gives them, and the place in the file after them."""
        with io.BufferedReader(io.FileIO(self._descriptor, closefd=False)) as file:
            file.seek(self._done)
            lines = [line for _ in range(limit) if (line := file.readline())]
            return list(parsed(lines)), file.tell()

    def forget(self, end: int) -> None:
        """What stands before `end` is home."""
        self._done = end

    def remove(self) -> None:
        """Delete the file and let it go."""
        try:
            self.path.unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        """Let the file go: others may claim it."""
        os.close(self._descriptor)


def parsed(lines: Sequence[bytes]) -> Iterator[tuple[bytes, Event | None]]:
    """Lines with the event each holds; `None` for one that was cut off, as by a machine that stopped in mid-write."""
    for line in lines:
        try:
            yield line, Event(**orjson.loads(line))
        except (orjson.JSONDecodeError, TypeError):
            yield line, None


def spool_files(home: Path) -> list[Path]:
    """The files under `home`, whoever holds them, by name."""
    return sorted((home / FOLDER).glob(PATTERN))
