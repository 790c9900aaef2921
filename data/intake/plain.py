"""Plain JSON values: what may stand in an event's body, and how values of other systems become it.

`check_plain` refuses at the boundary what the log could not write down or would write down as something
else: NaN becomes null in JSON, and a value nested too deeply cannot be written at all.
"""

import base64
import datetime as dt
import decimal
import math
import uuid
from typing import Any

from cluster.clock import to_iso
from cluster.errors import InputError

MAX_DEPTH = 100
"""Levels of nesting; the writer of JSON gives up at 254, and a body stands within an event."""
MAX_INTEGER = 2**63


def check_plain(value: Any, place: str, max_chars: int, depth: int = 0) -> None:
    """Raise `InputError` with the place of the first value that is no plain JSON.

    Texts may have `max_chars` characters; integers must fit 64 bits, floats must be finite.
    """
    if isinstance(value, str):
        if len(value) > max_chars:
            raise InputError(place, value, f"has {len(value)} characters, more than {max_chars}", "shorten it")
    elif isinstance(value, dict | list):
        if depth >= MAX_DEPTH:
            raise InputError(place, "…", f"is nested deeper than {MAX_DEPTH} levels", "flatten it")
        _check_inside(value, place, max_chars, depth)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(place, value, "must be a finite number", "leave it out")
    elif isinstance(value, int):
        if not -MAX_INTEGER <= value < MAX_INTEGER:
            raise InputError(place, value, "must fit 64 bits", "send it as text")
    elif value is not None:
        raise InputError(place, value, f"is no JSON value but {type(value).__name__}", "send text or a number")


def _check_inside(value: dict[Any, Any] | list[Any], place: str, max_chars: int, depth: int) -> None:
    named = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in named:
        if isinstance(value, dict) and not isinstance(name, str):
            raise InputError(place, name, "is no text but a key of an object", "use text as keys")
        if type(inner) is not int or not -MAX_INTEGER <= inner < MAX_INTEGER:  # token ids come by the thousand
            check_plain(inner, f"{place}.{name}" if place else str(name), max_chars, depth + 1)


def to_plain(value: Any, place: str = "row", depth: int = 0) -> Any:
    """A value as databases, Parquet and MLflow hand it out, as JSON: times as RFC 3339, decimals as numbers.

    Raises:
        InputError: text that is not UTF-8, or nesting without end.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if depth >= MAX_DEPTH:
        raise InputError(place, "…", f"is nested deeper than {MAX_DEPTH} levels", "flatten it")
    if isinstance(value, dict):
        return {str(name): to_plain(inner, f"{place}.{name}", depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(inner, f"{place}.{index}", depth + 1) for index, inner in enumerate(value)]
    return _scalar(value, place)


def _scalar(value: Any, place: str) -> Any:
    if isinstance(value, dt.datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=dt.UTC)
        return to_iso(round(moment.timestamp() * 1_000_000))
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _text(bytes(value), place)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return to_plain(value.tolist(), place)
    raise InputError(place, value, f"is a {type(value).__name__}, which JSON has no word for", "leave it out")


def _text(value: bytes, place: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        shown = base64.b64encode(value[:40]).decode()
        raise InputError(place, shown, "is not UTF-8 text (shown in base64)", "convert it to UTF-8") from None
