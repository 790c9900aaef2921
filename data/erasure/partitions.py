"""What an erasure takes out of sealed partitions: each is written anew beside itself, then takes its place."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import write
from cluster.errors import ConflictError
from cluster.tables import events
from data.partitions.bodies import forget_cached
from data.partitions.files import ROWS, read_batches, remove_file, write_file
from data.partitions.partition import Partition, next_path, older_paths, read_partitions, update_partition


def rewrite_partitions(engine: Engine, seqs: Sequence[int]) -> Iterator[Partition]:
    """Bring every partition that holds the person's records in line with the database."""
    if not seqs:
        return
    with engine.connect() as connection:
        known = read_partitions(connection, state=None)
    for partition in known:
        if not any(partition.after_seq < seq <= partition.upto_seq for seq in seqs):
            continue
        if partition.state != "sealed":  # a seal that was killed left what it had read; it will read again
            remove_file(partition.location, partition.path)
            continue
        digests = _erased_in(engine, partition)
        if digests:
            yield _rewrite(engine, partition, digests)


def _erased_in(engine: Engine, partition: Partition) -> dict[int, bytes]:
    marked = events.c.erased.is_(True) & events.c.body_digest.is_not(None)
    query = sa.select(events.c.seq, events.c.body_digest).where(partition.holds(), marked)
    with engine.connect() as connection:
        return {seq: bytes(of_body) for seq, of_body in connection.execute(query)}


def _rewrite(engine: Engine, partition: Partition, digests: dict[int, bytes]) -> Partition:
    marks = (row for batch in read_batches(partition, ["seq", "erased"]) for row in batch.to_pylist())
    pending = any(row["seq"] in digests and not row["erased"] for row in marks)
    if pending:
        path = next_path(partition)
        written = write_file(partition.location, path, (_without(batch, digests) for batch in read_batches(partition)))
        if (written.root, written.num_events) != (partition.root, partition.num_events):
            remove_file(partition.location, path)
            raise ConflictError(f"partition {partition.name} is not as it was sealed; run `rayloop verify`")
        values = {"path": path, "sha256": written.sha256, "num_bytes": written.num_bytes}
        with write(engine).begin() as connection:
            update_partition(connection, partition, values)
        with engine.connect() as connection:
            known = read_partitions(connection)
        partition = next(p for p in known if (p.after_seq, p.day) == (partition.after_seq, partition.day))
        forget_cached()
    for old in older_paths(partition):
        remove_file(partition.location, old)
    return partition


def _without(batch: pa.Table, digests: dict[int, bytes]) -> pa.Table:
    rows = batch.to_pylist()
    for row in rows:
        if row["seq"] in digests:
            row |= {"erased": True, "body_digest": digests[row["seq"]]}
            row |= dict.fromkeys(("user_id", "session_id", "salt", "body", "arrays"))
    return pa.Table.from_pylist(rows, ROWS)
