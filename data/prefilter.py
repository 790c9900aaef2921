"""Which recognisers could match a text at all: one Hyperscan pass for all of their hints together.

The pass only rules out. What it leaves is confirmed with `re`, so spans are the same as without it; texts
with digits or letters beyond ASCII that `re` takes for ASCII ones are left to `re` altogether.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

SPECIAL = ("\u0130", "\u0131", "\u017f", "\u212a")
"""Letters that equal an ASCII letter when case is ignored."""


class Prefilter:
    """A compiled set of hints; safe to share between threads."""

    def __init__(self, hints: Sequence[str]) -> None:
        """Compiles `hints`, regular expressions over bytes; takes some milliseconds.

        Raises:
            hyperscan.error: a hint is no pattern that Hyperscan knows.
        """
        import hyperscan

        once = hyperscan.HS_FLAG_SINGLEMATCH
        expressions = [*(hint.encode() for hint in hints), _odd_characters().encode()]
        flags = [once] * len(hints) + [once | hyperscan.HS_FLAG_UTF8]
        self._all = (1 << len(hints)) - 1
        self._odd = 1 << len(hints)
        self._database = hyperscan.Database()
        self._database.compile(
            expressions=expressions, ids=list(range(len(expressions))), elements=len(expressions), flags=flags
        )
        self._lock = threading.Lock()
        self._found = 0

    def masks(self, texts: Iterable[Any]) -> Iterator[int]:
        """For each text (its UTF-8 bytes): bit `i` is set when hint `i` occurs, or when that cannot be told."""
        scan, seen = self._database.scan, self._seen
        for text in texts:
            with self._lock:
                self._found = 0
                scan(text, match_event_handler=seen)
                found = self._found
            yield self._all if found & self._odd else found

    def _seen(self, number: int, _begin: int, _end: int, _flags: int, _context: object) -> None:
        self._found |= 1 << number


@cache
def _odd_characters() -> str:
    """A class of the decimal digits beyond ASCII, and of the letters in `SPECIAL`."""
    digits = re.findall(r"\d", "".join(map(chr, range(128, 0x110000))))
    return f"[{''.join((*digits, *SPECIAL))}]"
