"""The files of sealed partitions: Parquet on any `pyarrow.fs` location, whole and durable or not there.

Rows are in order of `seq`; `digest` and `salt` are kept, so a file proves itself without the database.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from cluster.errors import ConfigError, UnavailableError
from data.partitions.merkle import MerkleTree
from data.partitions.partition import Partition

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


@dataclass(frozen=True, slots=True)
class Written:
    """A file as it lies at its location."""

    num_events: int
    num_bytes: int
    sha256: str
    root: str


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
            yield read_row_group(file, partition.path, number, columns)


def read_row_group(file: pq.ParquetFile, path: str, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One row group of an open file.

    Raises:
        UnavailableError: it is damaged; the message says which `seq` it holds.
    """
    try:
        return file.read_row_group(number, columns=columns)
    except (OSError, pa.ArrowException) as error:
        first, last = seq_range(file, number)
        raise UnavailableError(
            f"{path} cannot be read at seq {first} to {last} ({_cause(error)}); restore a copy"
        ) from None


def seq_range(file: pq.ParquetFile, number: int) -> tuple[int, int]:
    """First and last `seq` of a row group; everything where it does not say."""
    statistics = file.metadata.row_group(number).column(0).statistics
    return (statistics.min, statistics.max) if statistics and statistics.has_min_max else (0, 2**62)


def _cause(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
