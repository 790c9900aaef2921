"""Every way we could think of to tamper with one record, in the database and in a sealed file.

Each takes the victim's `seq` and does its work as somebody with full access would, digests left as they are:
rewriting those too is what Merkle roots are for (`REWRITTEN`).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.tables import event_bodies, event_ids, events
from data.encoding import body_digest, event_digest
from data.log import recorded_event
from data.partitions.partition import Partition, day_of, read_partitions

InDatabase = Callable[[Connection, int], None]
InFile = Callable[[pa.Table, int], pa.Table]
TABLES = (events, event_bodies)


def _set(connection: Connection, seq: int, **values: Any) -> None:
    connection.execute(events.update().where(events.c.seq == seq).values(values))


def _renumber(connection: Connection, first: int, step: int) -> None:
    """Move every record from `first` on by `step`, by way of numbers nobody uses."""
    for table in TABLES:
        connection.execute(table.update().where(table.c.seq >= first).values(seq=-table.c.seq))
        connection.execute(table.update().where(table.c.seq < 0).values(seq=-table.c.seq + step))


def _copy(connection: Connection, seq: int, to: int, **changed: Any) -> None:
    for table in TABLES:
        row = connection.execute(sa.select(table).where(table.c.seq == seq)).mappings().first()
        if row is not None:
            known = {k: v for k, v in changed.items() if k in table.c}
            connection.execute(table.insert().values({**row, "seq": to, **known}))


def _remember(connection: Connection, seq: int, event_id: str) -> None:
    row = connection.execute(sa.select(events).where(events.c.seq == seq)).mappings().one()
    connection.execute(
        event_ids.insert().values(tenant=row["tenant"], event_id=event_id, recorded_at_us=row["recorded_at_us"])
    )


def alter_body(connection: Connection, seq: int) -> None:
    connection.execute(event_bodies.update().where(event_bodies.c.seq == seq).values(body=b'{"type":"thumbs_down"}'))


def alter_salt(connection: Connection, seq: int) -> None:
    connection.execute(event_bodies.update().where(event_bodies.c.seq == seq).values(salt=b"0" * 16))


def alter_arrays(connection: Connection, seq: int) -> None:
    connection.execute(event_bodies.update().where(event_bodies.c.seq == seq).values(arrays=b"\x01" + b"\0" * 15))


def alter_user(connection: Connection, seq: int) -> None:
    _set(connection, seq, user_id="eve")


def alter_time(connection: Connection, seq: int) -> None:
    row = connection.execute(sa.select(events.c.occurred_at_us).where(events.c.seq == seq)).scalar_one()
    _set(connection, seq, occurred_at_us=row + 1)


def alter_recorded_time(connection: Connection, seq: int) -> None:
    row = connection.execute(sa.select(events.c.recorded_at_us).where(events.c.seq == seq)).scalar_one()
    _set(connection, seq, recorded_at_us=row + 1)


def alter_kind(connection: Connection, seq: int) -> None:
    _set(connection, seq, kind="outcome")


def alter_tenant(connection: Connection, seq: int) -> None:
    _set(connection, seq, tenant="other")


def alter_interaction(connection: Connection, seq: int) -> None:
    _set(connection, seq, interaction_id="another")


def alter_digest(connection: Connection, seq: int) -> None:
    _set(connection, seq, digest=b"\0" * 32)


def drop(connection: Connection, seq: int) -> None:
    for table in TABLES:
        connection.execute(table.delete().where(table.c.seq == seq))


def drop_with_its_id(connection: Connection, seq: int) -> None:
    name = connection.execute(sa.select(events.c.event_id).where(events.c.seq == seq)).scalar_one()
    connection.execute(event_ids.delete().where(event_ids.c.event_id == name))
    drop(connection, seq)


def drop_and_close_the_gap(connection: Connection, seq: int) -> None:
    drop_with_its_id(connection, seq)
    _renumber(connection, seq + 1, -1)


def drop_body(connection: Connection, seq: int) -> None:
    connection.execute(event_bodies.delete().where(event_bodies.c.seq == seq))


def insert(connection: Connection, seq: int) -> None:
    _renumber(connection, seq, 1)
    _copy(connection, seq + 1, seq, event_id="inserted")
    _remember(connection, seq, "inserted")


def duplicate(connection: Connection, seq: int) -> None:
    _renumber(connection, seq + 1, 1)
    _copy(connection, seq, seq + 1)


def swap(connection: Connection, seq: int, other: int | None = None) -> None:
    other = seq + 1 if other is None else other
    for table in TABLES:
        for old, new in ((seq, -1), (other, seq), (-1, other)):
            connection.execute(table.update().where(table.c.seq == old).values(seq=new))


def swap_far(connection: Connection, seq: int) -> None:
    swap(connection, seq, seq // 2)


def swap_bodies(connection: Connection, seq: int) -> None:
    for old, new in ((seq, -1), (seq + 1, seq), (-1, seq + 1)):
        connection.execute(event_bodies.update().where(event_bodies.c.seq == old).values(seq=new))


def mark_erased(connection: Connection, seq: int) -> None:
    drop_body(connection, seq)
    _set(connection, seq, erased=True, user_id=None, session_id=None, body_digest=b"\0" * 32)


IN_DATABASE: tuple[InDatabase, ...] = (
    alter_body, alter_salt, alter_arrays, alter_user, alter_time, alter_recorded_time, alter_kind, alter_tenant,
    alter_interaction, alter_digest, drop, drop_with_its_id, drop_and_close_the_gap, drop_body, insert, duplicate,
    swap, swap_far, swap_bodies, mark_erased,
)  # fmt: skip
OF_BODIES = (alter_body, alter_salt, alter_arrays, drop_body, swap_bodies)
"""These find nothing to do once bodies have left the database."""


# in a sealed file


def _place(table: pa.Table, seq: int) -> int:
    return int(pc.index(table["seq"], seq).as_py())


def _changed(column: str, value: Any) -> InFile:
    def change(table: pa.Table, seq: int) -> pa.Table:
        values = table[column].to_pylist()
        values[_place(table, seq)] = value
        index = table.column_names.index(column)
        return table.set_column(index, table.schema.field(index), [pa.array(values, table.schema.field(index).type)])

    change.__name__ = f"file_alter_{column}"
    return change


def file_drop(table: pa.Table, seq: int) -> pa.Table:
    return table.filter(pc.not_equal(table["seq"], seq))


def file_duplicate(table: pa.Table, seq: int) -> pa.Table:
    place = _place(table, seq)
    return pa.concat_tables([table.slice(0, place + 1), table.slice(place)])


def file_swap(table: pa.Table, seq: int) -> pa.Table:
    order = list(range(len(table)))
    place = _place(table, seq)
    order[place], order[place - 1] = order[place - 1], order[place]
    return table.take(order)


def file_move_to_the_end(table: pa.Table, seq: int) -> pa.Table:
    place = _place(table, seq)
    return pa.concat_tables([table.slice(0, place), table.slice(place + 1), table.slice(place, 1)])


def file_move_to_the_start(table: pa.Table, seq: int) -> pa.Table:
    place = _place(table, seq)
    return pa.concat_tables([table.slice(place, 1), table.slice(0, place), table.slice(place + 1)])


def file_insert(table: pa.Table, seq: int) -> pa.Table:
    """A record of another place put in here, under a `seq` of its own."""
    place = _place(table, seq)
    strange = table.slice(place, 1).set_column(0, table.schema.field(0), [pa.array([seq], pa.int64())])
    strange = strange.set_column(1, table.schema.field(1), [pa.array(["inserted"])])
    return pa.concat_tables([table.slice(0, place), strange, table.slice(place + 1)])


IN_FILE: tuple[InFile, ...] = (
    _changed("body", '{"type":"thumbs_down"}'), _changed("user_id", "eve"), _changed("occurred_at_us", 7),
    _changed("digest", b"\0" * 32), _changed("salt", b"0" * 16), _changed("body", None), _changed("erased", True),
    _changed("interaction_id", "another"), file_drop, file_duplicate, file_swap, file_move_to_the_end,
    file_move_to_the_start, file_insert,
)  # fmt: skip


def partition_of(engine: Engine, seq: int) -> Partition:
    with engine.connect() as connection:
        row = connection.execute(sa.select(events).where(events.c.seq == seq)).mappings().one()
        known = read_partitions(connection)
    day = day_of(row["occurred_at_us"])
    return next(p for p in known if p.day == day and p.after_seq < seq <= p.upto_seq)


def tamper_with_file(partition: Partition, tamper: InFile, seq: int) -> None:
    """Rewrite the file as it was written, but for what `tamper` does."""
    path = Path(partition.location, partition.path)
    groups = pq.ParquetFile(path).metadata.row_group(0).num_rows
    table = tamper(pq.read_table(path, schema=pq.read_schema(path)), seq)
    draft = path.with_suffix(".tampered")
    pq.write_table(table, draft, compression="zstd", row_group_size=groups)
    os.replace(draft, path)


# digests rewritten too


def rewrite_in_database(connection: Connection, seq: int) -> None:
    """Another body, with a salt and a digest that fit it."""
    row = connection.execute(sa.select(events).where(events.c.seq == seq)).mappings().one()
    recorded = recorded_event(row, body={})
    text, salt = b'{"type":"thumbs_down"}', b"1" * 16
    digest = event_digest(seq, recorded.recorded_at_us, recorded.event, body_digest(salt, recorded.event, text, None))
    connection.execute(event_bodies.update().where(event_bodies.c.seq == seq).values(body=text, salt=salt, arrays=None))
    _set(connection, seq, digest=digest)


def rewrite_in_file(table: pa.Table, seq: int) -> pa.Table:
    row = table.slice(_place(table, seq), 1).to_pylist()[0]
    recorded = recorded_event(row, body={})
    text, salt = '{"type":"thumbs_down"}', b"1" * 16
    of_body = body_digest(salt, recorded.event, text.encode(), None)
    digest = event_digest(seq, recorded.recorded_at_us, recorded.event, of_body)
    for column, value in (("body", text), ("salt", salt), ("arrays", None), ("digest", digest)):
        table = _changed(column, value)(table, seq)
    return table
