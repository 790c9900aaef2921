"""A text without personal data and secrets: typed placeholders in their place.

The same value gets the same placeholder throughout a conversation (`<EMAIL_1>` … `<EMAIL_2>`), numbered
by first appearance, so an answer still refers to what the question named. The client scrubs with this in the
agent's own process, so it imports neither Arrow nor the settings.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from data.recognisers import Span, entropy_bits, find, find_among

if TYPE_CHECKING:
    from cluster.settings.curation import ScrubSettings

LONG_WORD = re.compile(r"[A-Za-z0-9+/=_-]+")
SEGMENT = re.compile(r"[/_-]")
RANDOM_SEGMENT = 20  # letters and digits in a row, without a separator, from which a word may be a key
BROKEN_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
SPELLED_EMAIL = re.compile(r"\b\w+ ?[\[(] ?at ?[\])] ?\w+ ?(?:[\[(] ?dot ?[\])]|\.) ?\w+", re.I)
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
    def of(settings: "ScrubSettings") -> "Looks":
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


def suspicion(text: str, settings: "ScrubSettings") -> str | None:
    """Why scrubbed text still looks unsafe, or `None`."""
    if BROKEN_KEY.search(text):
        return "part of a private key"
    if SPELLED_EMAIL.search(text):
        return "spelled-out address"
    for word in LONG_WORD.findall(text):
        if len(word) >= settings.entropy_characters and looks_random(word, settings):
            return "possible secret"
    return None


def looks_random(word: str, settings: "ScrubSettings") -> bool:
    """True for words like keys: a long segment of upper case, lower case and digits, of high entropy."""
    longest = max(SEGMENT.split(word), key=len)
    classes = (str.isupper, str.islower, str.isdigit)
    mixed = all(any(kind(character) for character in longest) for kind in classes)
    return mixed and len(longest) >= RANDOM_SEGMENT and entropy_bits(word) >= settings.entropy_bits
