"""Rows of a file of JSON lines or Parquet, one at a time, each with its place; bad lines are told apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cluster.errors import InputError

PARQUET_MAGIC = b"PAR1"
PARQUET_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    number: int
    """From 1: the line, or the row of a Parquet file."""
    value: Any
    """The parsed row; the raw text where it could not be parsed."""
    end: int
    """How far the file has been read: bytes, or rows of Parquet (see `size`)."""
    error: InputError | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """Rows in order. A line that is no JSON comes with its error; blank lines are skipped.

    Raises:
        InputError: the file is missing, empty, or damaged beyond its rows.
    """
    found = False
    for row in _parquet_rows(path) if _is_parquet(path) else _json_rows(path):
        found = True
        yield row
    if not found:
        raise InputError("file", str(path), "holds no rows", "name a file of JSON lines or Parquet")


def size(path: Path) -> int:
    """The `end` of the last row."""
    if not _is_parquet(path):
        return path.stat().st_size
    import pyarrow.parquet as pq

    return int(_open_parquet(path, pq).metadata.num_rows)


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == PARQUET_MAGIC
    except OSError as error:
        raise InputError("file", str(path), f"cannot be read ({error.strerror})", "name an existing file") from None


def _json_rows(path: Path) -> Iterator[Row]:
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            if not line.strip():
                continue
            try:
                yield Row(number, orjson.loads(line), end)
            except orjson.JSONDecodeError as error:
                yield Row(number, line.decode(errors="replace").rstrip("\n"), end, _bad_line(line, error))


def _bad_line(line: bytes, error: Exception) -> InputError:
    if not line.endswith(b"\n"):
        return InputError("line", line[-80:], "breaks off: the file is truncated", "fetch the whole file")
    return InputError("line", line[:80], f"is not valid JSON ({error})", "mend the line")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    for batch in _open_parquet(path, pq).iter_batches(PARQUET_BATCH):
        for value in batch.to_pylist():
            number += 1
            yield Row(number, {k: v for k, v in value.items() if v is not None}, number)


def _open_parquet(path: Path, pq: Any) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise InputError("file", str(path), f"is no whole Parquet file ({cause})", "fetch the whole file") from None
