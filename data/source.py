"""The event log as blocks of a Ray dataset: each task reads a range of `seq`, in short pages.

A range never changes once the log has passed it, so a task that is run again reads the same rows.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
import pyarrow as pa

from cluster.database import connect
from cluster.settings import Settings
from data.log import EventLog

KINDS = ("interaction", "feedback", "behaviour", "label", "grade")
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
        ("body", pa.string()),
    ]
)
"""One event a row; `body` is JSON, null when erased."""


@dataclass(frozen=True, slots=True)
class SeqRange:
    """Events with `after < seq <= last`."""

    after: int
    last: int


def plan_ranges(last_seq: int, events_per_block: int, parallelism: int | None) -> list[SeqRange]:
    """Equal ranges that cover the log: as many as asked for, else one for each `events_per_block`."""
    blocks = parallelism or -(-last_seq // events_per_block)
    blocks = max(1, min(blocks, last_seq))
    edges = [last_seq * i // blocks for i in range(blocks + 1)]
    return [SeqRange(a, b) for a, b in itertools.pairwise(edges)]


def read_range(settings: Settings, span: SeqRange) -> pa.Table:
    """The events of a range that curation needs, of the configured tenant and workspace."""
    return pa.Table.from_batches(_pages(settings, span), EVENTS)


def _pages(settings: Settings, span: SeqRange) -> Iterator[pa.RecordBatch]:
    engine = connect(settings, migrate=False)
    try:
        log, after = EventLog(engine), span.after
        while page := log.read(after, settings.curation.page_events, kinds=KINDS, tenant=settings.tenant):
            after = page[-1].seq
            rows = [r for r in page if r.seq <= span.last and r.event.workspace == settings.workspace]
            yield pa.RecordBatch.from_pylist(
                [
                    {
                        "kind": r.event.kind,
                        "event_id": r.event.event_id,
                        "interaction_id": r.event.interaction_id,
                        "user_id": r.event.user_id,
                        "session_id": r.event.session_id,
                        "agent": r.event.agent,
                        "at_us": r.event.occurred_at_us,
                        "body": None if r.erased else _body(r.event.kind, r.event.body),
                    }
                    for r in rows
                ],
                EVENTS,
            )
            if after >= span.last:
                return
    finally:
        engine.dispose()


def _body(kind: str, body: dict[str, object]) -> str:
    """The body as JSON; token ids leave, only their number stays."""
    if kind == "interaction":
        counts = {"answer_tokens": len(body.get("completion_token_ids") or ())}  # type: ignore[arg-type]
        left_out = ("prompt_token_ids", "completion_token_ids", "completion_logprobs")
        body = {k: v for k, v in body.items() if k not in left_out} | counts
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode()
