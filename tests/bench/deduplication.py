"""Near-duplicate removal against datasketch and gaoya: the same texts, shingles, bands and threshold.

    python -m tests.bench.deduplication [--rows 20000] [--repeats 3]

The peers are installed into an environment of their own, under `RAYLOOP_BENCH_CACHE` (by default
`~/.cache/rayloop-bench`). All sides start from texts and end with the rows that have a near duplicate before them;
they are run in turn, in processes that use one thread and have done a few hundred texts before the clock starts. A
fifth of the texts are edited copies (Jaccard similarity 0.95 with what they copy), the rest are unrelated, so all
must flag the same rows.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGETS = {"datasketch": 25.0, "gaoya": 5.0}
PEERS = ("datasketch==2.0.0", "gaoya==0.2.2")
WORDS, COPIES, VOCABULARY = 120, 0.2, 20_000
WARM = 500  # texts before the clock starts

PEER_CODE = """
import json, re, sys, time

texts, options = json.load(open(sys.argv[1])), json.loads(sys.argv[2])
k, bands, rows, threshold = (options[n] for n in ("shingle_words", "bands", "rows_per_band", "threshold"))
warm = int(sys.argv[3])
"""
DATASKETCH = (
    PEER_CODE
    + """
import numpy as np
from datasketch import MinHash, MinHashLSH

def flag(texts):
    lsh = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    sketches, flagged = [], []
    for number, text in enumerate(texts):
        words = [""] * (k - 1) + re.findall(r"\\w+", text.lower()) + [""] * (k - 1)
        shingles = {" ".join(words[i : i + k]).encode() for i in range(len(words) - k + 1)}
        sketch = MinHash(num_perm=bands * rows, seed=1)
        sketch.update_batch(list(shingles))
        if any(sketches[other].jaccard(sketch) >= threshold for other in lsh.query(sketch)):
            flagged.append(number)
        lsh.insert(number, sketch)
        sketches.append(sketch)
    return flagged
"""
)
GAOYA = (
    PEER_CODE
    + """
from gaoya.minhash import MinHashStringIndex

def flag(texts):
    index = MinHashStringIndex(32, threshold, bands, rows, None, "word", True, (k, k))
    index.par_bulk_insert_docs(list(range(len(texts))), texts)
    return [n for n, found in enumerate(index.par_bulk_query(texts)) if min(found, default=n) < n]
"""
)
TIMED = """
flag(texts[:warm])
begun, cpu = time.perf_counter(), time.process_time()
flagged = flag(texts)
seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "flagged": flagged}))
"""


def make_texts(rows: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts, and the numbers of those that are edited copies of an earlier one."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    copies = []
    for number in range(rows):
        if texts and rng.random() < COPIES:
            words = list(texts[rng.randrange(len(texts))])
            words[rng.randrange(WORDS)] = "edited"
            copies.append(number)
        else:
            words = [f"w{rng.randrange(VOCABULARY)}" for _ in range(WORDS)]
        texts.append(words)
    return [" ".join(words) for words in texts], copies


def ours(texts: Sequence[str]) -> dict[str, Any]:
    """Our side, in this process: rows that share a cluster with an earlier row."""
    import numpy as np

    from cluster.settings.curation import DeduplicationSettings
    from data.dedup import sketch_texts
    from data.near import cluster_of, find_clusters, near_edges

    settings = DeduplicationSettings()

    def flag(texts: Sequence[str]) -> list[int]:
        ids = np.arange(len(texts), dtype=np.uint64)
        sketches = sketch_texts(list(texts), ids, ids, np.zeros(len(texts), np.uint64), settings)
        edges = near_edges(sketches, settings)
        return list(np.flatnonzero(cluster_of(ids, find_clusters(edges, ids[:0])) != ids).tolist())

    flag(texts[:WARM])
    begun, cpu = time.perf_counter(), time.process_time()
    flagged = flag(texts)
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu, "flagged": flagged}


def peer_python() -> Path:
    """The Python of the peers' own environment, made on first use."""
    cache = Path(os.environ.get("RAYLOOP_BENCH_CACHE", Path.home() / ".cache" / "rayloop-bench"))
    folder = cache / "-".join(PEERS).replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        (folder / "ready").touch()
    return python


def run(command: Sequence[Any]) -> dict[str, Any]:
    """One side, in a process with one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | threads, capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Run all sides in turn; 1 when they flagged different rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(json.loads(options.ours.read_text()))))
        return 0
    from cluster.settings.curation import DeduplicationSettings

    texts, copies = make_texts(options.rows)
    python, settings = peer_python(), DeduplicationSettings().model_dump_json()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "datasketch": [], "gaoya": []}
    flagged: dict[str, set[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts))
        commands = {
            "ours": [sys.executable, "-m", "tests.bench.deduplication", "--ours", file],
            "datasketch": [python, "-c", DATASKETCH + TIMED, file, settings, WARM],
            "gaoya": [python, "-c", GAOYA + TIMED, file, settings, WARM],
        }
        for _ in range(options.repeats):
            for side, command in commands.items():
                result = run(command)
                times[side].append((result["seconds"], result["cpu"]))
                flagged[side] = set(result["flagged"])
    return report(options.rows, times, flagged, set(copies))


def report(
    rows: int, times: dict[str, list[tuple[float, float]]], flagged: dict[str, set[int]], copies: set[int]
) -> int:
    """Print medians, agreement and the ratios: of wall time, and of CPU time where the machine is shared."""
    medians = {side: [statistics.median(t) for t in zip(*runs, strict=True)] for side, runs in times.items()}
    for side, (wall, cpu) in medians.items():
        found = flagged[side]
        recall, precision = len(found & copies) / len(copies), len(found & copies) / max(1, len(found))
        print(
            f"{side:10} median {wall:7.3f} s wall {cpu:7.3f} s cpu  {rows / cpu:9,.0f} rows/s of cpu  "
            f"flagged {len(found)}  recall {recall:.4f}  precision {precision:.4f}"
        )
    different = 0
    for peer, target in TARGETS.items():
        wall, cpu = (medians[peer][i] / medians["ours"][i] for i in (0, 1))
        apart = len(flagged["ours"] ^ flagged[peer])
        print(
            f"{peer}: {wall:.1f} x wall, {cpu:.1f} x cpu (target {target:g} x); {apart} rows flagged by one side only"
        )
        different += apart
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
