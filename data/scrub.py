"""Stage 5, scrub: personal data and secrets become typed placeholders, the same throughout a conversation.

One pass over the bytes of each column says which recognisers a row could need; only those look at it closely
(`data.scrub_text`).
"""

from collections import Counter, defaultdict
from functools import cache, reduce
from operator import or_
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings.curation import ScrubSettings
from data.join import to_json
from data.prefilter import Prefilter
from data.recognisers import RECOGNISERS
from data.scrub_text import Looks, Placeholders, scrub_value, suspicion
from data.stages import Dropped, Row, keep, rows_of, with_column

DRAWN = ("messages", "response", "tools")
"""Columns that the log-probability of an answer is about."""
SCRUBBED = ("messages", "context", "response", "tail", "signals", "labels", "tools")
"""Columns of JSON text, in the order in which placeholders are numbered."""
JUDGED = ("signals", "labels")
OURS = r'"(?:at_us|logged_us|weight)":[0-9.e-]+|"(?:user|reviewer)":"[^"\\]*"'
"""What we write into these; a text cannot hold it, for its quotes are escaped."""
SUSPICIOUS = 1 << len(RECOGNISERS)
"""Bit of rows in which `suspicion` could find something."""


def scrub(table: pa.Table, settings: ScrubSettings) -> tuple[pa.Table, Dropped]:
    """Scrubs the text columns, adds `scrubbed` (JSON `{kind: values}`), quarantines unsafe rows."""
    if not settings.enabled:
        return with_column(table, "scrubbed", ["{}"] * len(table), pa.string()), Counter()
    masks = possibly_unsafe(table, settings.entropy_characters)
    looks = Looks.of(settings)
    if looks.names != "off":
        masks = {index: masks.get(index, 0) for index in range(len(table))}
    places = pa.array(list(masks), pa.int64())
    rows = rows_of(table.select([*SCRUBBED, "answer_logprob"]).take(places))
    found = dict.fromkeys(range(len(table)), "{}")
    reasons: list[str | None] = [None] * len(table)
    changed: dict[str, dict[int, str | float | None]] = defaultdict(dict)
    for (place, mask), row in zip(masks.items(), rows, strict=True):
        found[place], scrubbed = scrub_row(row, looks, mask)
        for name, value in scrubbed.items():
            changed[name][place] = value
        if mask & SUSPICIOUS and (reason := suspicion(_texts_of(row | scrubbed), settings)):
            reasons[place] = f"quarantine: {reason}"
    for name, values in changed.items():
        table = with_column(table, name, _replaced(table[name].to_pylist(), values), table.schema.field(name).type)
    return keep(with_column(table, "scrubbed", list(found.values()), pa.string()), reasons)


def scrub_row(row: Row, looks: Looks, mask: int) -> tuple[str, Row]:
    """How many values of each kind a row held (JSON), and the columns that are different without them."""
    placeholders = Placeholders()
    changed: Row = {}
    for name in SCRUBBED:
        if not row[name] or row[name] == "[]":
            continue
        before = orjson.loads(row[name])
        after = scrub_value(before, placeholders, looks=looks, mask=mask)
        if after != before:
            changed[name] = to_json(after)
    if not changed.keys().isdisjoint(DRAWN):
        changed["answer_logprob"] = None
    return to_json(placeholders.counts), changed


def _texts_of(row: Row) -> str:
    return "\n".join(row[name] or "" for name in SCRUBBED)


def _replaced(column: list[Any], values: dict[int, Any]) -> list[Any]:
    for place, value in values.items():
        column[place] = value
    return column


@cache
def _prefilter(entropy_characters: int) -> Prefilter:
    """The hints of the recognisers, and of what `suspicion` looks for."""
    suspicious = rf"[A-Za-z0-9+/=_-]{{{entropy_characters}}}|[\[(] ?(?i:at) ?[\])]|PRIVATE KEY"
    return Prefilter([*(recogniser.hint for recogniser in RECOGNISERS), suspicious])


def _said(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """JSON of signals or labels without times and pseudonyms, whose digits look like much that they are not."""
    return pc.replace_substring_regex(column, OURS, "")


def _masks(column: pa.ChunkedArray, scan: Prefilter) -> list[int]:
    """What each text could need; an empty list nothing. Equal texts, as votes without words are, are read once."""
    distinct = pc.dictionary_encode(column).combine_chunks()
    texts = [text.encode() for text in distinct.dictionary.to_pylist()]
    found = [mask if len(text) > 2 else 0 for text, mask in zip(texts, scan.masks(texts), strict=True)]
    return [0 if index is None else found[index] for index in distinct.indices.to_pylist()]


def possibly_unsafe(table: pa.Table, entropy_characters: int) -> dict[int, int]:
    """The rows that must be looked at: row -> mask of the recognisers (and `SUSPICIOUS`) it could need."""
    scan = _prefilter(entropy_characters)
    columns = (_masks(_said(table[name]) if name in JUDGED else table[name], scan) for name in SCRUBBED)
    masks = (reduce(or_, row) for row in zip(*columns, strict=True))
    return {place: mask for place, mask in enumerate(masks) if mask}
