"""A source: rows under a name, read when they are asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.rows import Row, read_rows, size


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A relation that a database declares: `column` refers to `other` of `table`."""

    column: str
    table: str
    other: str


@dataclass(frozen=True, slots=True)
class Source:
    """Rows, under a name."""

    name: str
    rows: Callable[[], Iterator[Row]]
    total: Callable[[], int]
    """The `end` of the last row; 0 where only reading would tell."""
    foreign_keys: tuple[ForeignKey, ...] = ()


def file_source(path: Path) -> Source:
    """A file of JSON lines or Parquet."""
    return Source(path.name, lambda: read_rows(path), lambda: size(path))
