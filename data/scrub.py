"""Stage 5, scrub: personal data and secrets become typed placeholders.

The same value gets the same placeholder throughout a conversation (`<EMAIL_1>` … `<EMAIL_2>`), numbered
by first appearance, so an answer still refers to what the question named. One RE2 pass over the whole
column finds the rows that could hold anything; only those are looked at closely.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings.curation import ScrubSettings
from data.join import to_json
from data.recognisers import RECOGNISERS, entropy_bits, find
from data.stages import Dropped, keep, with_column

SCRUBBED = ("messages", "context", "response", "signals", "labels", "tools")
"""Columns of JSON text, in the order in which placeholders are numbered."""
PREFILTER = "|".join(dict.fromkeys(f"(?:{r.hint})" for r in RECOGNISERS))
LONG_WORD = re.compile(r"[A-Za-z0-9+/=_-]+")
SEGMENT = re.compile(r"[/_-]")
RANDOM_SEGMENT = 20  # letters and digits in a row, without a separator, from which a word may be a key
BROKEN_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
SPELLED_EMAIL = re.compile(r"\b\w+ ?[\[(] ?at ?[\])] ?\w+ ?(?:[\[(] ?dot ?[\])]|\.) ?\w+", re.I)
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


def scrub_text(text: str, placeholders: Placeholders | None = None, *, domains: bool = True) -> str:
    """The text with every recognised value replaced. Scrubbing twice changes nothing more."""
    known = placeholders or Placeholders()
    parts, position = [], 0
    for span in find(text, domains=domains):
        parts += [text[position : span.start], known.of(span.kind, span.value)]
        position = span.end
    return "".join(parts) + text[position:]


def scrub_value(value: Any, placeholders: Placeholders, *, domains: bool = True) -> Any:
    """A JSON value with every text in it scrubbed."""
    if isinstance(value, str):
        return scrub_text(value, placeholders, domains=domains)
    if isinstance(value, list):
        return [scrub_value(item, placeholders, domains=domains) for item in value]
    if isinstance(value, dict):
        return {k: v if k in NAMES else scrub_value(v, placeholders, domains=domains) for k, v in value.items()}
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
    suspects = possibly_unsafe(table, settings).to_pylist()
    columns = {name: table[name].to_pylist() for name in SCRUBBED}
    found = ["{}"] * len(table)
    reasons: list[str | None] = [None] * len(table)
    for index in (i for i, suspect in enumerate(suspects) if suspect):
        placeholders = Placeholders()
        for name in SCRUBBED:
            if columns[name][index]:
                clean = scrub_value(orjson.loads(columns[name][index]), placeholders, domains=settings.domains)
                columns[name][index] = to_json(clean)
        found[index] = to_json(placeholders.counts)
        texts = "\n".join(columns[name][index] or "" for name in SCRUBBED)
        reason = suspicion(texts, settings)
        reasons[index] = f"quarantine: {reason}" if reason else None
    for name in SCRUBBED:
        table = with_column(table, name, columns[name], pa.string())
    return keep(with_column(table, "scrubbed", found, pa.string()), reasons)


def possibly_unsafe(table: pa.Table, settings: ScrubSettings) -> pa.Array:
    """Which rows must be looked at: one RE2 pass over each column of text."""
    pattern = rf"{PREFILTER}|[A-Za-z0-9+/=_-]{{{settings.entropy_characters}}}|[\[(] ?at ?[\])]"
    unsafe = pa.array([False] * len(table), pa.bool_())
    for name in SCRUBBED:
        hit = pc.fill_null(pc.match_substring_regex(table[name].combine_chunks(), pattern), False)
        unsafe = pc.or_(unsafe, hit)
    return unsafe
