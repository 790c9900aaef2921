"""Bodies that have left the database, read back from sealed partitions."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy.engine import Engine

from cluster.errors import UnavailableError
from data.encoding import decode_body
from data.partitions.files import open_parquet, read_row_group, seq_range
from data.partitions.partition import Partition, read_partitions

CACHED_ROW_GROUPS = 4


def sealed_bodies(engine: Engine, seqs: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Bodies that have left the database, by `seq`; what is in no sealed partition is left out.

    Raises:
        UnavailableError: a file is missing or damaged.
    """
    found: dict[int, dict[str, Any]] = {}
    with engine.connect() as connection:
        known = read_partitions(connection)
    for partition in known:
        wanted = [seq for seq in seqs if partition.after_seq < seq <= partition.upto_seq]
        if wanted:
            found |= _bodies_in(engine, partition, wanted)
    return found


def _bodies_in(engine: Engine, partition: Partition, wanted: Sequence[int]) -> dict[int, dict[str, Any]]:
    try:
        return dict(_decoded(partition, wanted))
    except FileNotFoundError:
        pass  # an erasure has moved it on since the registry was read
    with engine.connect() as connection:
        fresh = [p for p in read_partitions(connection) if (p.after_seq, p.day) == (partition.after_seq, partition.day)]
    try:
        return dict(_decoded(fresh[0], wanted))
    except FileNotFoundError:
        raise UnavailableError(f"{fresh[0].location}/{fresh[0].path} is missing; restore it from a copy") from None


def _decoded(partition: Partition, wanted: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, (first, last) in enumerate(_row_groups(partition.location, partition.path)):
        inside = [seq for seq in wanted if first <= seq <= last]
        if not inside:
            continue
        table = _bodies(partition.location, partition.path, number)
        table = table.filter(pc.is_in(table["seq"], pa.array(inside, pa.int64())))
        for row in table.to_pylist():
            if row["body"] is not None:
                yield row["seq"], decode_body(row["body"].encode(), row["arrays"])


@lru_cache(maxsize=256)
def _row_groups(location: str, path: str) -> list[tuple[int, int]]:
    """First and last `seq` of each row group; a file never changes, so this may be kept."""
    with open_parquet(location, path) as file:
        return [seq_range(file, number) for number in range(file.num_row_groups)]


@lru_cache(maxsize=CACHED_ROW_GROUPS)
def _bodies(location: str, path: str, number: int) -> pa.Table:
    with open_parquet(location, path) as file:
        return read_row_group(file, path, number, ["seq", "body", "arrays"])


def forget_cached() -> None:
    """Let go of the row groups this process has in memory."""
    _bodies.cache_clear()
    _row_groups.cache_clear()
