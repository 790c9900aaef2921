"""Sealed partitions: which events of one day and one stretch of the log lie in which file, registered in the database.

A file is written once. What must change in it, an erasure, writes the next generation beside it, moves the
row of `partitions` over and removes the old one, so a reader finds a whole file or looks again.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.clock import DAY_US, SECOND_US
from cluster.tables import events, partitions

GENERATION = re.compile(r"\.r(\d+)\.parquet$")


@dataclass(frozen=True, slots=True)
class Partition:
    """A row of `partitions`: the events of `day` (by the time they occurred) with `after_seq < seq <= upto_seq`."""

    after_seq: int
    day: str
    upto_seq: int
    state: str
    """`writing`, or `sealed`: the file is whole and durable."""
    location: str
    path: str
    """Below `location`."""
    num_events: int
    num_bytes: int | None = None
    sha256: str | None = None
    """Of the file."""
    root: str | None = None
    """RFC 6962 Merkle root over the digests in order of `seq`; an erasure leaves it as it is."""
    sealed_at_us: int | None = None
    bodies_left_us: int | None = None
    """When the bodies were deleted from the database."""

    @property
    def name(self) -> str:
        """For people and for the log."""
        return f"{self.day}/{self.after_seq + 1}-{self.upto_seq}"

    def holds(self) -> sa.ColumnElement[bool]:
        """The condition on `events` for this partition's rows."""
        start_us = day_start_us(self.day)
        return sa.and_(
            events.c.seq > self.after_seq,
            events.c.seq <= self.upto_seq,
            events.c.occurred_at_us >= start_us,
            events.c.occurred_at_us < start_us + DAY_US,
        )


def day_of(at_us: int) -> str:
    """The UTC day, as `2026-01-31`."""
    return datetime.fromtimestamp(at_us // SECOND_US, UTC).date().isoformat()


def day_start_us(day: str) -> int:
    """When a day begins."""
    return round(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * SECOND_US


def path_of(day: str, after_seq: int, upto_seq: int, generation: int = 0) -> str:
    """Where a partition lies below its location."""
    return f"dt={day}/{after_seq + 1:012d}-{upto_seq:012d}.r{generation}.parquet"


def next_path(partition: Partition) -> str:
    """Where the next generation of a partition goes."""
    return _path_of_generation(partition, _generation(partition) + 1)


def older_paths(partition: Partition) -> list[str]:
    """Where earlier generations of a partition were."""
    return [_path_of_generation(partition, number) for number in range(_generation(partition))]


def _generation(partition: Partition) -> int:
    found = GENERATION.search(partition.path)
    assert found is not None, partition.path
    return int(found[1])


def _path_of_generation(partition: Partition, generation: int) -> str:
    return path_of(partition.day, partition.after_seq, partition.upto_seq, generation)


def read_partitions(connection: Connection, *, state: str | None = "sealed") -> list[Partition]:
    """The registered partitions in order of the log; `state=None` for those being written too."""
    query = sa.select(partitions).order_by(partitions.c.after_seq, partitions.c.day)
    if state is not None:
        query = query.where(partitions.c.state == state)
    return [Partition(**row) for row in connection.execute(query).mappings()]


def update_partition(connection: Connection, partition: Partition, values: dict[str, Any]) -> None:
    """Change the row of a partition."""
    this = (partitions.c.after_seq == partition.after_seq) & (partitions.c.day == partition.day)
    connection.execute(partitions.update().where(this).values(values))


def sealed_upto(known: Iterable[Partition]) -> int:
    """Every event with a `seq` up to this one is in a sealed partition; 0 before the first seal."""
    listed = list(known)
    writing = [p.after_seq for p in listed if p.state != "sealed"]
    return min(writing) if writing else max((p.upto_seq for p in listed), default=0)
