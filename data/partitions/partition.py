"""Sealed partitions: events of one day and one stretch of the log in a Parquet file, registered in the database.

A file is written once. What must change in it, an erasure, writes the next generation beside it, moves the
row of `partitions` over and removes the old one, so a reader finds a whole file or looks again. Rows are in
order of `seq`; `digest` and `salt` are kept, so a file proves itself without the database.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import DAY_US, SECOND_US
from cluster.errors import ConfigError, UnavailableError
from cluster.tables import events, partitions
from data.encoding import decode_body
from data.partitions.merkle import MerkleTree

ROWS = pa.schema(
    [
        ("seq", pa.int64()),
        ("event_id", pa.string()),
        ("kind", pa.string()),
        ("tenant", pa.string()),
        ("workspace", pa.string()),
        ("occurred_at_us", pa.int64()),
        ("recorded_at_us", pa.int64()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("agent", pa.string()),
        ("interaction_id", pa.string()),
        ("digest", pa.binary()),  # data.encoding.event_digest: the leaves of the Merkle tree
        ("erased", pa.bool_()),
        ("body_digest", pa.binary()),  # of erased events only
        ("salt", pa.binary()),  # null when erased, as the next two
        ("body", pa.string()),  # JSON
        ("arrays", pa.binary()),  # token ids and log-probabilities, packed (data.encoding)
    ]
)
"""Columns of a partition."""

CHUNK_BYTES = 1 << 20
CACHED_ROW_GROUPS = 4
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


@dataclass(frozen=True, slots=True)
class Written:
    """A file as it lies at its location."""

    num_events: int
    num_bytes: int
    sha256: str
    root: str


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


def sealed_upto(known: Iterable[Partition]) -> int:
    """Every event with a `seq` up to this one is in a sealed partition; 0 before the first seal."""
    listed = list(known)
    writing = [p.after_seq for p in listed if p.state != "sealed"]
    return min(writing) if writing else max((p.upto_seq for p in listed), default=0)


def open_location(location: str) -> tuple[Any, str]:
    """The file system behind a folder or URI, and the path on it.

    Raises:
        ConfigError: nothing `pyarrow.fs` knows.
    """
    try:
        if "://" not in location:
            return pyarrow.fs.LocalFileSystem(), os.path.abspath(location)
        filesystem, path = pyarrow.fs.FileSystem.from_uri(location)
    except (pa.ArrowException, OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(
            "storage.events",
            location,
            f"is no location ({cause})",
            "name a folder, or a URI such as s3://bucket/events",
        ) from None
    return filesystem, path.rstrip("/")


def write_file(location: str, path: str, batches: Iterable[pa.Table]) -> Written:
    """Write rows of `ROWS` as one file, whole or not at all, durable on return; each batch is a row group.

    Raises:
        ConfigError: not a location.
        UnavailableError: it cannot be written.
    """
    filesystem, root_path = open_location(location)
    final = f"{root_path}/{path}"
    folder, draft = final.rpartition("/")[0], _draft_of(final)
    try:
        filesystem.create_dir(folder, recursive=True)
        tree = _write_rows(filesystem, draft, batches)
        _make_durable(filesystem, draft)
        filesystem.move(draft, final)
        _make_durable(filesystem, folder)
        sha256, num_bytes = hash_file(location, path)
    except OSError as error:
        raise UnavailableError(
            f"{location} cannot be written ({_cause(error)}); mend it or set `storage.events` in rayloop.yaml"
        ) from None
    return Written(tree.size, num_bytes, sha256, tree.root().hex())


def _write_rows(filesystem: Any, path: str, batches: Iterable[pa.Table]) -> MerkleTree:
    tree = MerkleTree()
    with (
        filesystem.open_output_stream(path) as stream,
        pq.ParquetWriter(stream, ROWS, compression="zstd", write_page_checksum=True) as writer,
    ):
        for batch in batches:
            for digest in batch["digest"].to_pylist():
                tree.add(digest)
            writer.write_table(batch, row_group_size=max(1, len(batch)))
        writer.add_key_value_metadata({"rayloop.root": tree.root().hex(), "rayloop.events": str(tree.size)})
    return tree


def _make_durable(filesystem: Any, path: str) -> None:
    """`fsync` where files are local; other stores are durable once they answer."""
    if not isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(location: str, path: str) -> tuple[str, int]:
    """SHA-256 (hexadecimal) and size in bytes of a file.

    Raises:
        OSError: it cannot be read.
    """
    filesystem, root = open_location(location)
    total, size = hashlib.sha256(), 0
    with filesystem.open_input_stream(f"{root}/{path}", compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            total.update(chunk)
            size += len(chunk)
    return total.hexdigest(), size


def remove_file(location: str, path: str) -> None:
    """Delete a file, and a draft of it; what is gone already is fine."""
    filesystem, root = open_location(location)
    final = f"{root}/{path}"
    for file in (final, _draft_of(final)):
        if filesystem.get_file_info(file).type != pyarrow.fs.FileType.NotFound:
            filesystem.delete_file(file)


def _draft_of(final: str) -> str:
    folder, _, name = final.rpartition("/")
    return f"{folder}/.{name}.part"


def open_parquet(location: str, path: str) -> pq.ParquetFile:
    """A file of ours, to be read in row groups.

    Raises:
        FileNotFoundError: it is not there.
        UnavailableError: it is no Parquet file, or has other columns.
    """
    filesystem, root = open_location(location)
    try:
        file = pq.ParquetFile(filesystem.open_input_file(f"{root}/{path}"), page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise UnavailableError(f"{root}/{path} cannot be read ({_cause(error)}); restore it from a copy") from None
    if not file.schema_arrow.equals(ROWS):
        raise UnavailableError(f"{root}/{path} has columns {file.schema_arrow.names}; restore it from a copy")
    return file


def read_batches(partition: Partition, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a partition, one row group in memory at a time.

    Raises:
        FileNotFoundError, UnavailableError: as `open_parquet`; also for a row group that is damaged.
    """
    with open_parquet(partition.location, partition.path) as file:
        for number in range(file.num_row_groups):
            try:
                yield file.read_row_group(number, columns=columns)
            except (OSError, pa.ArrowException) as error:
                first, last = _seq_range(file, number)
                raise UnavailableError(
                    f"{partition.path} cannot be read at seq {first} to {last} ({_cause(error)}); restore a copy"
                ) from None


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
        return [_seq_range(file, number) for number in range(file.num_row_groups)]


@lru_cache(maxsize=CACHED_ROW_GROUPS)
def _bodies(location: str, path: str, number: int) -> pa.Table:
    with open_parquet(location, path) as file:
        try:
            return file.read_row_group(number, columns=["seq", "body", "arrays"])
        except (OSError, pa.ArrowException) as error:
            raise UnavailableError(f"{path} cannot be read ({_cause(error)}); restore it from a copy") from None


def forget_cached() -> None:
    """Let go of the row groups this process has in memory."""
    _bodies.cache_clear()
    _row_groups.cache_clear()


def _seq_range(file: pq.ParquetFile, number: int) -> tuple[int, int]:
    statistics = file.metadata.row_group(number).column(0).statistics
    return (statistics.min, statistics.max) if statistics and statistics.has_min_max else (0, 2**62)


def _cause(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
