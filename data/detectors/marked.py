"""Recall and precision of the recognisers on sentences in which people marked personal data.

The file is a JSON list of `{"full_text", "spans": [{"entity_type", "start_position", "end_position"}]}`, the form
of presidio-research. A mark is found when recognised spans cover it, those of its own kind where we have it; of a web
address, its host is enough.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from data.recognisers import Span
from data.scrub_text import EVERYTHING_STRUCTURED, Looks, spans_of

KINDS = {
    "EMAIL_ADDRESS": "EMAIL",
    "CREDIT_CARD": "CARD",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "US_SSN": "SSN",
    "PHONE_NUMBER": "PHONE",
    "DOMAIN_NAME": "DOMAIN",
}
"""Marked kind -> what we call it; the other kinds (names, places, dates) have no recogniser here."""


@dataclass
class Marked:
    """Counts by marked kind, and spans that touch no mark by our kind."""

    marks: Counter[str]
    found: Counter[str]
    touched: Counter[str]
    """Marks that a span at least overlaps."""
    spurious: Counter[str]
    missed: list[str]
    """The first few marks of structured kinds that were not found."""
    spans: Counter[str] = field(default_factory=Counter)
    """By our kind."""
    right: Counter[str] = field(default_factory=Counter)
    """Spans of structured kinds that touch a mark of the same kind."""

    def recall(self, kind: str) -> float:
        """Share of the marks of a kind that were found."""
        return self.found[kind] / self.marks[kind] if self.marks[kind] else 1.0

    def precision(self, kind: str) -> float:
        """Share of the spans of a structured kind that touch a mark of that kind."""
        ours = KINDS[kind]
        return self.right[ours] / self.spans[ours] if self.spans[ours] else 1.0

    def lines(self) -> list[str]:
        """A line for each kind, structured ones first, then all together."""
        kinds = sorted(self.marks, key=lambda kind: (kind not in KINDS, kind))
        made = [
            f"{kind:18} recall {self.recall(kind):.3f} ({self.found[kind]}/{self.marks[kind]})"
            + (f", precision {self.precision(kind):.3f}" if kind in KINDS else f", touched {self.touched[kind]}")
            for kind in kinds
        ]
        covered, touched, precision = self.overall
        made.append(f"{'all':18} covered {covered:.3f}, touched {touched:.3f}, precision {precision:.3f}")
        return made

    @property
    def overall(self) -> tuple[float, float, float]:
        """Of all marks the share covered whole and the share touched; of all spans the share that touch a mark."""
        total, spans = sum(self.marks.values()), sum(self.spans.values())
        return (
            sum(self.found.values()) / total,
            sum(self.touched.values()) / total,
            (spans - sum(self.spurious.values())) / max(1, spans),
        )


def measure_marked(file: Path, shown: int = 10, looks: Looks = EVERYTHING_STRUCTURED) -> Marked:
    """Looks for personal data in every sentence of a file and compares with the marks.

    Raises:
        InputError: the file is not of the form above.
    """
    try:
        sentences = json.loads(file.read_text(encoding="utf-8"))
        result = Marked(Counter(), Counter(), Counter(), Counter(), [])
        for sentence in sentences:
            _compare(sentence, spans_of(sentence["full_text"], looks), result, shown)
    except OSError as error:
        raise InputError("file", str(file), f"cannot be read ({error.strerror})", "name an existing file") from None
    except (ValueError, KeyError, TypeError) as error:
        rule = f"is no list of marked sentences ({error!r})"
        raise InputError("file", str(file), rule, "see the form in data/detectors/marked.py") from None
    return result


def _compare(sentence: dict[str, Any], spans: list[Span], result: Marked, shown: int) -> None:
    marks = [(m["entity_type"], m["start_position"], m["end_position"]) for m in sentence["spans"]]
    for kind, start, end in marks:
        own = [s for s in spans if s.kind == KINDS.get(kind, s.kind)]
        covered = sum(max(0, min(end, s.end) - max(start, s.start)) for s in own)
        hit = covered > 0 if kind == "DOMAIN_NAME" else covered == end - start
        result.marks[kind] += 1
        result.found[kind] += hit
        result.touched[kind] += covered > 0
        if not hit and kind in KINDS and len(result.missed) < shown:
            result.missed.append(f"{kind} {sentence['full_text'][start:end]!r}")
    for span in spans:
        touching = [KINDS.get(kind) for kind, start, end in marks if start < span.end and span.start < end]
        result.spans[span.kind] += 1
        result.right[span.kind] += span.kind in touching
        result.spurious[span.kind] += not touching
