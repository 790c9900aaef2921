"""Times are integers: microseconds since 1970-01-01 UTC, in columns and fields that end in `_us`."""

import time
from datetime import UTC, datetime

SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US


def now_us() -> int:
    """The time now."""
    return time.time_ns() // 1000


def to_iso(at_us: int) -> str:
    """RFC 3339 text, in UTC with microseconds."""
    return datetime.fromtimestamp(at_us / SECOND_US, UTC).isoformat(timespec="microseconds")


def from_iso(text: str) -> int:
    """Microseconds of an RFC 3339 text; a text without an offset is UTC.

    Raises:
        ValueError: not a date and time.
    """
    moment = datetime.fromisoformat(text)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * SECOND_US)
