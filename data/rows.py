"""Rows of a file of JSON lines or Parquet, one at a time, each with its place; bad lines are told apart."""

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cluster.errors import InputError
from data.intake.plain import to_plain

PARQUET_MAGIC = b"PAR1"
PARQUET_BATCH = 1024
GZIP_MAGIC = b"\x1f\x8b"


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
        _refuse_other_encodings(path, file.read(4))
        file.seek(0)
        for number, line in enumerate(file, 1):
            end += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield Row(number, orjson.loads(line), end)
            except orjson.JSONDecodeError as error:
                yield Row(number, line.decode(errors="replace").rstrip("\n"), end, _bad_line(line, error))


def _refuse_other_encodings(path: Path, head: bytes) -> None:
    """A file that no line of can be read gets one error, not one a line."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:2]:
        raise InputError("file", str(path), "is UTF-16 text", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8")
    if head.startswith(GZIP_MAGIC):
        raise InputError("file", str(path), "is compressed", "unpack it: gunzip")


def _bad_line(line: bytes, error: Exception) -> InputError:
    if not line.endswith(b"\n"):
        return InputError("line", line[-80:], "breaks off: the file is truncated", "fetch the whole file")
    return InputError("line", line[:80], f"is not valid JSON ({error})", "mend the line")


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Row group by row group: a damaged one is told and the others are read."""
    import pyarrow.parquet as pq

    file, first = _open_parquet(path, pq), 1
    for group in range(file.num_row_groups):
        rows, number = file.metadata.row_group(group).num_rows, first
        try:
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=[group]):
                for value in _values(batch):
                    yield _plain_row(number, value)
                    number += 1
        except (OSError, ValueError) as error:
            rule = f"of row group {group} are damaged ({str(error).splitlines()[0]})"
            span = f"{number} to {first + rows - 1}"
            yield Row(number, None, first + rows - 1, InputError("rows", span, rule, "write the file again"))
        first += rows


def _values(batch: Any) -> Iterator[Any]:
    """The rows of a batch as dicts; a row that cannot be decoded comes as its error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(len(batch)):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                shown = error.object[:40] if isinstance(error.object, bytes) else b""
                yield InputError("row", shown, "holds text that is not UTF-8", "convert it to UTF-8")


def _plain_row(number: int, value: Any) -> Row:
    return Row(number, None, number, value) if isinstance(value, InputError) else plain_row(number, value)


def plain_row(number: int, value: Mapping[str, Any]) -> Row:
    """A row of a table, its values as JSON and absent ones left out."""
    try:
        plain = {str(k): to_plain(v, str(k)) for k, v in value.items() if v is not None}
    except InputError as error:
        return Row(number, None, number, error)
    return Row(number, plain, number)


def _open_parquet(path: Path, pq: Any) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise InputError("file", str(path), f"is no whole Parquet file ({cause})", "fetch the whole file") from None
