"""Finding personal data against eight passes of `re`: the same patterns, checks and texts.

    python -m tests.bench.scrubbing [--rows 20000] [--repeats 5]

Both sides get the same texts and return the spans of eight kinds, found with the same patterns and confirmed
by the same checks; they must be identical. One text in twenty holds something to find, every fifth of the
others something that looks a little like it (a date, a time, a price, a version).
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from data.prefilter import Prefilter
from data.recognisers import RECOGNISERS, Recogniser, Span

TARGET = 10.0
KINDS = ("JWT", "API_KEY", "EMAIL", "IBAN", "IP", "CARD", "SSN", "PHONE")
WORDS = 120
FINDS = [
    "write to {w}@example.org", "call +44 20 7946 0958", "card 4111 1111 1111 1111", "IBAN DE89 3704 0044 0532 0130 00",
    "from 192.0.2.17", "ssn 219-09-9999", "key ghp_" + "a1B2c3D4" * 4,
    "token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc",
]  # fmt: skip
LOOKALIKES = ["on 2024-01-31 at 12:30:45", "1,250,000.00 in all", "version 1.2.3", "rooms 101-104", "ratio 16:9"]


def make_texts(rows: int, seed: int = 0) -> list[str]:
    """Texts of made-up words, some with a find or with a lookalike in the middle."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    vocabulary = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(5000)]
    texts = []
    for _ in range(rows):
        words = [rng.choice(vocabulary) for _ in range(WORDS)]
        if rng.random() < 0.05:
            words[rng.randrange(WORDS)] = rng.choice(FINDS).format(w=rng.choice(vocabulary))
        elif rng.random() < 0.2:
            words[rng.randrange(WORDS)] = rng.choice(LOOKALIKES)
        texts.append(" ".join(words))
    return texts


def spans(text: str, recognisers: Sequence[Recogniser]) -> list[Span]:
    """One pass of `re` for each recogniser; the earlier one has it where two overlap."""
    found: list[Span] = []
    for recogniser in recognisers:
        for match in recogniser.pattern.finditer(text):
            if recogniser.check is not None and not recogniser.check(match):
                continue
            group = "value" if "value" in recogniser.pattern.groupindex else 0
            start, end = match.span(group)
            if all(end <= s.start or start >= s.end for s in found):
                found.append(Span(recogniser.kind, start, end, match[group]))
    return sorted(found, key=lambda span: span.start)


def timed(side: Callable[[], list[list[Span]]]) -> tuple[float, list[list[Span]]]:
    """CPU seconds of this process, which is alone on its thread, and what was found."""
    begun = time.process_time()
    found = side()
    return time.process_time() - begun, found


def main() -> int:
    """Run both sides in turn; 1 when their spans differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    texts = make_texts(options.rows)
    chosen = [recogniser for recogniser in RECOGNISERS if recogniser.kind in KINDS]
    scan = Prefilter([recogniser.hint for recogniser in chosen])

    def ours() -> list[list[Span]]:
        masks = scan.masks(text.encode() for text in texts)
        return [
            spans(text, [r for n, r in enumerate(chosen) if mask >> n & 1]) if mask else []
            for text, mask in zip(texts, masks, strict=True)
        ]

    sides = {"ours": ours, "re": lambda: [spans(text, chosen) for text in texts]}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, list[list[Span]]] = {}
    for _ in range(options.repeats):
        for side, run in sides.items():
            took, found[side] = timed(run)
            seconds[side].append(took)
    for side, times in seconds.items():
        median = statistics.median(times)
        print(f"{side:6} median {median:7.3f} s cpu  {options.rows / median:11,.0f} rows/s")
    ratio = statistics.median(seconds["re"]) / statistics.median(seconds["ours"])
    total = sum(map(len, found["re"]))
    print(f"ratio {ratio:.1f} x (target {TARGET:g} x); {total} spans, identical: {found['ours'] == found['re']}")
    return 0 if found["ours"] == found["re"] else 1


if __name__ == "__main__":
    sys.exit(main())
