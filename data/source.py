"""The event log as blocks of a Ray dataset: sealed days from their Parquet, the tail from the database.

A block names partitions, a range of `seq` beyond them, or both. Neither changes once it is written, but for
erasures, so a task that is run again reads the same rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.errors import UnavailableError
from cluster.settings import Settings
from data.encoding import ARRAYS, decode_body, decompress, lengths_of
from data.log import EventLog
from data.partitions.files import read_batches
from data.partitions.partition import Partition, read_partitions, sealed_upto
from data.propensity import answer_logprob

KINDS = ("interaction", "trajectory", "tool_call", "feedback", "behaviour", "label", "grade")
"""What curation reads."""
EVENTS = pa.schema(
    [
        ("kind", pa.string()),
        ("event_id", pa.string()),
        ("interaction_id", pa.string()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("agent", pa.string()),
        ("at_us", pa.int64()),
        ("logged_us", pa.int64()),  # when the log took it
        ("body", pa.string()),
    ]
)
"""One event a row; `body` is JSON, null when erased."""
READ = (
    "kind", "event_id", "interaction_id", "user_id", "session_id", "agent", "occurred_at_us", "recorded_at_us",
    "body", "arrays",
)  # fmt: skip
TOKENS = tuple(name for name, _ in ARRAYS)
MOVED = 3  # times that a file is looked up anew: an erasure may move it while it is read


@dataclass(frozen=True, slots=True)
class Block:
    """Some sealed partitions, and events with `after < seq <= last` that are in none."""

    partitions: tuple[tuple[int, str], ...]
    """`after_seq` and day of each."""
    after: int
    last: int

    def to_json(self) -> str:
        """As a row of a Ray dataset holds it."""
        return orjson.dumps((self.partitions, self.after, self.last)).decode()

    @staticmethod
    def from_json(text: str) -> "Block":
        """The inverse of `to_json`."""
        places, after, last = orjson.loads(text)
        return Block(tuple((after_seq, day) for after_seq, day in places), after, last)


def plan_blocks(engine: Engine, last_seq: int, events_per_block: int, parallelism: int | None) -> list[Block]:
    """Blocks that cover the log up to `last_seq`: as many as asked for, else one for each `events_per_block`."""
    with engine.connect() as connection:
        known = read_partitions(connection, state=None)
    whole = min(sealed_upto(known), last_seq)
    sealed = [p for p in known if p.upto_seq <= whole]
    start = max((p.upto_seq for p in sealed), default=0)
    blocks = parallelism or -(-last_seq // events_per_block)
    blocks = max(1, min(blocks, last_seq))
    tail = last_seq - start
    edges = [start + tail * i // blocks for i in range(blocks + 1)]
    shared = _shared_out(sealed, blocks)
    return [Block(tuple((p.after_seq, p.day) for p in shared[i]), edges[i], edges[i + 1]) for i in range(blocks)]


def describe_sources(engine: Engine, blocks: Sequence[Block]) -> dict[str, Any]:
    """What blocks are read from, for the manifest: each sealed partition with its hashes, and the `tail` of the log.

    `sha256` is that of the file now: an erasure writes another, and leaves the Merkle `root`.
    """
    places = {place for block in blocks for place in block.partitions}
    with engine.connect() as connection:
        known = [p for p in read_partitions(connection, state=None) if (p.after_seq, p.day) in places]
    partitions = [{"name": p.name, "sha256": p.sha256, "root": p.root, "num_events": p.num_events} for p in known]
    first, last = blocks[0].after + 1, blocks[-1].last
    return {
        "first_seq": 1,
        "last_seq": last,
        "partitions": partitions,
        "tail": {"first_seq": first, "last_seq": last} if first <= last else None,
    }


def _shared_out(sealed: Sequence[Partition], blocks: int) -> list[list[Partition]]:
    """Each partition to the block with the fewest events, the largest first."""
    shares: list[list[Partition]] = [[] for _ in range(blocks)]
    loads = [0] * blocks
    for partition in sorted(sealed, key=lambda p: (-p.num_events, p.after_seq, p.day)):
        least = loads.index(min(loads))
        shares[least].append(partition)
        loads[least] += partition.num_events
    return shares


def read_block(settings: Settings, block: Block) -> pa.Table:
    """`read_events` over a connection of its own."""
    engine = connect(settings, migrate=False)
    try:
        return read_events(engine, settings, block)
    finally:
        engine.dispose()


def read_events(engine: Engine, settings: Settings, block: Block) -> pa.Table:
    """The events of a block that curation needs, of the configured tenant and workspace."""
    sealed = [table for place in block.partitions for table in _sealed(engine, settings, place)]
    return pa.concat_tables([*sealed, pa.Table.from_batches(_pages(engine, settings, block), EVENTS)])


def _sealed(engine: Engine, settings: Settings, place: tuple[int, str]) -> list[pa.Table]:
    """A partition's events; read again from the start when an erasure moved the file meanwhile."""
    for _ in range(MOVED):
        with engine.connect() as connection:
            partition = next(p for p in read_partitions(connection) if (p.after_seq, p.day) == place)
        try:
            return [_wanted(batch, settings) for batch in read_batches(partition)]
        except FileNotFoundError:
            continue
    raise UnavailableError(f"{partition.location}/{partition.path} is missing; restore it from a copy")


def _wanted(batch: pa.Table, settings: Settings) -> pa.Table:
    mine = pc.and_(pc.equal(batch["tenant"], settings.tenant), pc.equal(batch["workspace"], settings.workspace))
    rows = batch.filter(pc.and_(mine, pc.is_in(batch["kind"], pa.array(KINDS)))).select(list(READ))
    bodies = [
        None if text is None else _stored_body(kind, text.encode(), arrays)
        for kind, text, arrays in zip(*(rows[n].to_pylist() for n in ("kind", "body", "arrays")), strict=True)
    ]
    columns = [rows[name] for name in READ[:-2]]
    return pa.table([*columns, pa.array(bodies, pa.string())], schema=EVENTS)


def _pages(engine: Engine, settings: Settings, block: Block) -> Iterator[pa.RecordBatch]:
    """Events beyond the sealed days, a short read at a time."""
    log, after = EventLog(engine), block.after
    while after < block.last:
        page = log.read_stored(after, settings.curation.page_events, kinds=KINDS, tenant=settings.tenant)
        if not page:
            return
        after = page[-1].seq
        rows = [r for r in page if r.seq <= block.last and r.workspace == settings.workspace]
        texts = [None if r.body is None else _stored_body(r.kind, r.body, r.arrays) for r in rows]
        columns = [list(map(attrgetter(name), rows)) for name in READ[:-2]]
        yield pa.RecordBatch.from_arrays(
            [pa.array(values, field.type) for values, field in zip([*columns, texts], EVENTS, strict=True)],
            schema=EVENTS,
        )


def _stored_body(kind: str, stored: bytes, arrays: bytes | None) -> str:
    """`_body` of a body as it is kept: its text is canonical JSON, so it is parsed only where that tells more.

    Token lists that hold anything are in `arrays` and not in the text (`data.encoding.encode_body`).
    """
    text = decompress(stored)
    if kind != "interaction" and arrays is None:
        return text.decode()
    lengths = {} if arrays is None else lengths_of(arrays)
    if kind != "interaction" or text == b"{}" or lengths.get("completion_logprobs"):
        return _body(kind, decode_body(text, arrays))
    return f'{{"answer_tokens":{lengths.get("completion_token_ids", 0)},{text[1:].decode()}'


def _body(kind: str, body: dict[str, object]) -> str:
    """The body as JSON; token ids and log-probabilities leave, only their number and sum stay."""
    if kind == "interaction":
        counts: dict[str, object] = {"answer_tokens": len(body.get("completion_token_ids") or ())}  # type: ignore[arg-type]
        if (logprob := answer_logprob(body)) is not None:
            counts["answer_logprob"] = logprob
        body = {k: v for k, v in body.items() if k not in TOKENS} | counts
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode()
