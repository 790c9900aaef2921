"""Finding personal data against eight passes of `re`, and against presidio without named entities.

    python -m tests.bench.scrubbing [--rows 20000] [--repeats 5] [--peer-rows 500]

Ours and `re` get the same texts and return the spans of eight kinds, found with the same patterns and confirmed by
the same checks; they must be identical. One text in twenty holds something to find, every fifth of the others
something that looks a little like it (a date, a time, a price, a version).

Presidio is installed into an environment of its own, under `RAYLOOP_BENCH_CACHE` (by default
`~/.cache/rayloop-bench`), with a spaCy pipeline that only splits words, and is asked for the kinds it knows (e-mail,
IBAN, IP, card, SSN, phone) in as many of the texts as `--peer-rows`; both sides must find e-mails, IBANs, cards and IP
addresses in the same texts. Cost is per text.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from data.prefilter import Prefilter
from data.recognisers import RECOGNISERS, Recogniser, Span

TARGET, PRESIDIO_TARGET = 10.0, 100.0
PRESIDIO = "presidio-analyzer==2.2.366"
PRESIDIO_KINDS = {"EMAIL_ADDRESS": "EMAIL", "IBAN_CODE": "IBAN", "CREDIT_CARD": "CARD", "IP_ADDRESS": "IP"}
PRESIDIO_CODE = """
import json, sys, tempfile, time
import spacy
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import NlpEngineProvider

texts, kinds = json.load(open(sys.argv[1])), json.loads(sys.argv[2])
folder = tempfile.mkdtemp()
spacy.blank("en").to_disk(folder)
models = [{"lang_code": "en", "model_name": folder}]
engine = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models}).create_engine()
analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
wanted = [*kinds, "US_SSN", "PHONE_NUMBER"]
analyzer.analyze(text=texts[0], language="en", entities=wanted)
begun = time.process_time()
found = [analyzer.analyze(text=text, language="en", entities=wanted) for text in texts]
seconds = time.process_time() - begun
print(json.dumps({"seconds": seconds, "kinds": [sorted({r.entity_type for r in one}) for one in found]}))
"""
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


def presidio(texts: Sequence[str]) -> tuple[float, list[set[str]]]:
    """CPU seconds a text, and our names of the kinds that presidio found in each."""
    python = environment("presidio", [PRESIDIO])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(list(texts)))
        command = [str(python), "-c", PRESIDIO_CODE, str(file), json.dumps(PRESIDIO_KINDS)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    kinds = [{PRESIDIO_KINDS[k] for k in one if k in PRESIDIO_KINDS} for one in said["kinds"]]
    return said["seconds"] / len(texts), kinds


def environment(name: str, packages: Sequence[str]) -> Path:
    """The Python of an environment with these packages; made on first use."""
    cache = Path(os.environ.get("RAYLOOP_BENCH_CACHE", Path.home() / ".cache" / "rayloop-bench"))
    folder = cache / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python


def main() -> int:
    """Run the sides in turn; 1 when they find different things."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-rows", type=int, default=500)
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
    each, theirs = presidio(texts[: options.peer_rows])
    known = set(PRESIDIO_KINDS.values())
    ours_too = [{span.kind for span in one} & known for one in found["ours"][: options.peer_rows]]
    differing = sum(a != b for a, b in zip(ours_too, theirs, strict=True))
    mine = statistics.median(seconds["ours"]) / options.rows
    print(
        f"presidio without entities: {1 / each:,.0f} rows/s, ratio {each / mine:.0f} x (target {PRESIDIO_TARGET:g} x)"
    )
    print(f"{sum(map(bool, theirs))} of {len(theirs)} texts hold something for both; {differing} texts differ")
    return 0 if found["ours"] == found["re"] and not differing else 1


if __name__ == "__main__":
    sys.exit(main())
