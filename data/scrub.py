"""Stage 5, scrub: personal data and secrets become typed placeholders.

The same value gets the same placeholder throughout a conversation (`<EMAIL_1>` … `<EMAIL_2>`), numbered
by first appearance, so an answer still refers to what the question named. One pass over the bytes of each
column says which recognisers a row could need; only those look at it closely.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import or_
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings.curation import ScrubSettings
from data.join import to_json
from data.prefilter import Prefilter
from data.recognisers import RECOGNISERS, Span, entropy_bits, find, find_among
from data.stages import Dropped, Row, keep, rows_of, with_column

DRAWN = ("messages", "response", "tools")
"""Columns that the log-probability of an answer is about."""
SCRUBBED = ("messages", "context", "response", "tail", "signals", "labels", "tools")
"""Columns of JSON text, in the order in which placeholders are numbered."""
JUDGED = ("signals", "labels")
OURS = r'"at_us":[0-9]+|"(?:user|reviewer)":"[^"\\]*"'
"""What we write into these; a text cannot hold it, for its quotes are escaped."""
LONG_WORD = re.compile(r"[A-Za-z0-9+/=_-]+")
SEGMENT = re.compile(r"[/_-]")
RANDOM_SEGMENT = 20  # letters and digits in a row, without a separator, from which a word may be a key
BROKEN_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
SPELLED_EMAIL = re.compile(r"\b\w+ ?[\[(] ?at ?[\])] ?\w+ ?(?:[\[(] ?dot ?[\])]|\.) ?\w+", re.I)
SUSPICIOUS = 1 << len(RECOGNISERS)
"""Bit of rows in which `suspicion` could find something."""
PLACEHOLDER = re.compile(r"<[A-Z_]+_\d+>?|[A-Z_]+_\d+>")
NAMES = frozenset({"role", "type", "id", "tool_call_id", "source", "category", "user", "reviewer"})
"""Keys whose values are ours, not text."""


@dataclass
class Placeholders:
    """The placeholders of one conversation."""

    known: dict[tuple[str, str], str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def of(self, kind: str, value: str) -> str:
        """The placeholder of a value; spacing and case make no difference."""
        key = (kind, re.sub(r"[\s().-]", "", value).lower())
        if key not in self.known:
            self.counts[kind] += 1
            self.known[key] = f"<{kind}_{self.counts[kind]}>"
        return self.known[key]


@dataclass(frozen=True, slots=True)
class Looks:
    """What is looked for besides secrets and structured data."""

    domains: bool = True
    names: Literal["off", "builtin", "presidio"] = "off"
    presidio_model: str = ""

    @staticmethod
    def of(settings: ScrubSettings) -> "Looks":
        """As the settings say."""
        return Looks(settings.domains, settings.names, settings.presidio_model)


EVERYTHING_STRUCTURED = Looks()


def scrub_text(
    text: str,
    placeholders: Placeholders | None = None,
    *,
    looks: Looks = EVERYTHING_STRUCTURED,
    mask: int | None = None,
) -> str:
    """The text with every recognised value replaced. Scrubbing twice changes nothing more.

    `mask` names the recognisers that could match (`data.recognisers.find_among`), where that is known.
    """
    known = placeholders or Placeholders()
    parts, position = [], 0
    for span in spans_of(text, looks, mask):
        parts += [text[position : span.start], known.of(span.kind, span.value)]
        position = span.end
    return "".join(parts) + text[position:]


def spans_of(text: str, looks: Looks, mask: int | None = None) -> list[Span]:
    """Structured data and secrets first; names where nothing else is."""
    spans = find(text, domains=looks.domains) if mask is None else find_among(text, mask, domains=looks.domains)
    if looks.names == "off":
        return spans
    named = _names(text, looks)
    free = [name for name in named if all(name.end <= s.start or name.start >= s.end for s in spans)]
    free = [name for name in free if not PLACEHOLDER.search(text[max(0, name.start - 1) : name.end + 4])]
    return sorted([*spans, *free], key=lambda span: span.start)


def _names(text: str, looks: Looks) -> list[Span]:
    if looks.names == "presidio":
        from data.presidio import find_with_presidio

        return find_with_presidio(text, looks.presidio_model)
    from data.names import find_names

    return find_names(text)


def scrub_value(
    value: Any, placeholders: Placeholders, *, looks: Looks = EVERYTHING_STRUCTURED, mask: int | None = None
) -> Any:
    """A JSON value with every text in it scrubbed."""
    if isinstance(value, str):
        return scrub_text(value, placeholders, looks=looks, mask=mask)
    if isinstance(value, list):
        return [scrub_value(item, placeholders, looks=looks, mask=mask) for item in value]
    if isinstance(value, dict):
        return {k: v if k in NAMES else scrub_value(v, placeholders, looks=looks, mask=mask) for k, v in value.items()}
    return value


def suspicion(text: str, settings: ScrubSettings) -> str | None:
    """Why scrubbed text still looks unsafe, or `None`."""
    if BROKEN_KEY.search(text):
        return "part of a private key"
    if SPELLED_EMAIL.search(text):
        return "spelled-out address"
    for word in LONG_WORD.findall(text):
        if len(word) >= settings.entropy_characters and looks_random(word, settings):
            return "possible secret"
    return None


def looks_random(word: str, settings: ScrubSettings) -> bool:
    """True for words like keys: a long segment of upper case, lower case and digits, of high entropy."""
    longest = max(SEGMENT.split(word), key=len)
    classes = (str.isupper, str.islower, str.isdigit)
    mixed = all(any(kind(character) for character in longest) for kind in classes)
    return mixed and len(longest) >= RANDOM_SEGMENT and entropy_bits(word) >= settings.entropy_bits


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
