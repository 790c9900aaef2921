"""The `metadata` map of an item: bounded, and scrubbed of personal data before it is written down."""

from typing import Any

from data.recognisers import find

PAIRS, NAME_CHARACTERS, VALUE_CHARACTERS = 16, 64, 512
"""OpenAI's own bounds."""

Value = str | int | float | bool


def bounded(metadata: Any, keep: int = PAIRS) -> dict[str, Value]:
    """What of a client's map may be kept; of what is too much, the end is left out. `keep` leaves room for others."""
    if not isinstance(metadata, dict):
        return {}
    plain = [(str(k)[:NAME_CHARACTERS], v) for k, v in metadata.items() if isinstance(v, Value)]
    return {k: v[:VALUE_CHARACTERS] if isinstance(v, str) else v for k, v in plain[:keep]}


def scrubbed(metadata: dict[str, Value]) -> dict[str, Value]:
    """The map with every recognised value in its texts and names replaced by the name of its kind."""
    return {_clean(name): _clean(value) if isinstance(value, str) else value for name, value in metadata.items()}


def _clean(text: str) -> str:
    parts, position = [], 0
    for span in find(text, domains=False):
        parts += [text[position : span.start], f"<{span.kind}>"]
        position = span.end
    return "".join(parts) + text[position:]
