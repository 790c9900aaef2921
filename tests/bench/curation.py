"""Curation as a whole against a plain Ray Data pipeline of `map`, `re` and datasketch.

    python -m tests.bench.curation [--rows 100000 1000000] [--peer-rows 20000] [--events-per-block 50000]

Ours goes from the event log (a question and an answer each, thumbs on four of five) to a published dataset
with scrubbing, detectors, near-duplicate clusters, pairs, splits and manifest. The peer goes from the same
rows, already joined, to a Parquet file: `map` with eight `re` substitutions, `map` with a score and a filter,
datasketch MinHash and LSH over the questions, one file. It does less; both must find the same number of
distinct questions, up to the sketches' error. Both run in processes of their own with the same number of CPUs.
Cost is per row, so the peer may run on fewer. Memory is the highest sum of private memory of all processes, beside
an object store of 512 MB, which the fewest rows fill too (Ray moves to disk what does not fit); its use is the largest
shared memory of a process. CPU seconds are those of all processes, start of Ray included, for machines that are
shared.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

TARGET = 10.0
SAME = 0.02
FLAT = 1.15
"""Most that the memory may grow from the fewest rows to the most, that of the object store apart."""
PEER = "datasketch==2.0.0"
CPUS = 2
STORE_MB = 512
COPIES, WORDS, USERS = 0.2, 60, 5000

PEER_CODE = """
import json, os, re, sys, time
import ray, ray.data
from datasketch import MinHash, MinHashLSH
source, out, cpus, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
PATTERNS = [(re.compile(p), name) for name, p in options["patterns"].items()]
ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
begun = time.perf_counter()

def scrub(row):
    for column in ("question", "answer"):
        for pattern, name in PATTERNS:
            row[column] = pattern.sub("<" + name + ">", row[column])
    return row

def score(row):
    words = len(row["answer"].split())
    row["score"] = 0.7 * (row["reward"] + 1) / 2 + 0.3 * min(1.0, words / 50)
    return row

def sketch(row):
    k = options["shingle_words"]
    words = [""] * (k - 1) + re.findall(r"\\w+", row["question"].lower()) + [""] * (k - 1)
    made = MinHash(num_perm=options["bands"] * options["rows_per_band"], seed=1, scheme="affine32")
    made.update_batch([" ".join(words[i : i + k]).encode() for i in range(len(words) - k + 1)])
    row["sketch"] = made.hashvalues
    return row

data = ray.data.read_parquet(source).map(scrub).map(score).filter(lambda row: row["reward"] != 0).map(sketch)
shape = options["bands"], options["rows_per_band"]
lsh = MinHashLSH(num_perm=shape[0] * shape[1], params=shape)
kept, sketches = [], {}
for number, row in enumerate(data.iter_rows()):
    made = MinHash(num_perm=len(row["sketch"]), seed=1, hashvalues=row.pop("sketch"), scheme="affine32")
    near = [o for o in lsh.query(made) if sketches[o].jaccard(made) >= options["threshold"]]
    if not near:
        lsh.insert(number, made)
        sketches[number] = made
        kept.append(row)
ray.data.from_items(kept).write_parquet(out)
print(json.dumps({"seconds": time.perf_counter() - begun, "distinct": len(kept)}))
"""


def make_rows(rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Questions of which a fifth are edited copies, some with personal data, and what people said."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    vocabulary = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(20_000)]
    recent: list[list[str]] = []
    for number in range(rows):
        if recent and rng.random() < COPIES:
            words = list(rng.choice(recent))
            words[rng.randrange(WORDS)] = "edited"
        else:
            words = [rng.choice(vocabulary) for _ in range(WORDS)]
            recent = [*recent[-999:], words]
        question = " ".join(words) + (f" mail {words[0]}@example.org" if rng.random() < 0.05 else "")
        answer = " ".join(rng.choice(vocabulary) for _ in range(60))
        reward = rng.choice([1.0, 1.0, 1.0, -1.0, 0.0])
        yield {"number": number, "question": question, "answer": answer, "reward": reward}


def fill(home: Path, source: Path, rows: int) -> None:
    """The log that ours reads and the Parquet file that the peer reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cluster.database import connect
    from cluster.settings import load_settings
    from data.events import Event, parse_body
    from data.log import EventLog

    log = EventLog(connect(load_settings(home=home)[0]))
    writer = None
    batch: list[dict[str, Any]] = []

    def flush() -> None:
        nonlocal writer
        events = []
        for row in batch:
            ids = {"user_id": f"u{row['number'] % USERS}", "agent": "a", "interaction_id": f"i{row['number']}"}
            at_us = 1_790_000_000_000_000 + row["number"] * 1_000_000
            body = {
                "messages": [{"role": "user", "content": row["question"]}],
                "response": {"role": "assistant", "content": row["answer"]},
                "finish_reason": "stop",
            }
            said = parse_body("interaction", body)
            events.append(Event("interaction", "default", "default", said, occurred_at_us=at_us, **ids))
            if row["reward"]:
                kind = "thumbs_up" if row["reward"] > 0 else "thumbs_down"
                said = parse_body("feedback", {"type": kind, "reward": row["reward"]})
                events.append(Event("feedback", "default", "default", said, occurred_at_us=at_us + 1, **ids))
        log.append(events)
        table = pa.Table.from_pylist(batch)
        writer = writer or pq.ParquetWriter(source, table.schema)
        writer.write_table(table)
        batch.clear()

    for row in make_rows(rows):
        batch.append(row)
        if len(batch) == 10_000:
            flush()
    if batch:
        flush()
    if writer is not None:
        writer.close()


def ours(home: Path, events_per_block: int) -> dict[str, Any]:
    """Our side, in this process; Ray is up before the clock starts, as with the peer."""
    from cluster.runtime import ray_session
    from cluster.settings import load_settings
    from data.curate import curate

    session = {"num_cpus": CPUS, "object_store_mb": STORE_MB}
    curation = {"log_to_mlflow": False, "stage_cpus": 1.0, "events_per_block": events_per_block}
    settings = load_settings(home=home, ray=session, curation=curation)[0]
    with ray_session(settings):
        begun = time.perf_counter()
        made = curate(settings, agent="a")
        seconds = time.perf_counter() - begun
    stages = {stage.name: stage for stage in made.stages}
    return {
        "seconds": seconds,
        "rows": stages["filter"].rows_out,
        "path": str(made.path),
        "dropped": {n: s.dropped for n, s in stages.items() if s.dropped},
    }


def distinct_questions(dataset: Path) -> int:
    """How many clusters of near duplicates its examples belong to."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    files = [str(file) for file in dataset.rglob("*.parquet")]
    return len(pc.unique(ds.dataset(files).to_table(columns=["cluster_id"])["cluster_id"]))


def measured(command: Sequence[Any], environment: dict[str, str]) -> dict[str, Any]:
    """One side in a process of its own, with the peak of its tree's private memory and its CPU seconds."""
    process = subprocess.Popen(
        [str(part) for part in command], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    peak = store = 0
    used: dict[int, float] = {}
    over = threading.Event()

    def watch() -> None:
        nonlocal peak, store
        root = psutil.Process(process.pid)
        while not over.wait(0.5):
            total = 0
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return  # it has ended, and all it started with it
            for one in tree:
                try:
                    memory = one.memory_info()
                    total += memory.rss - memory.shared
                    store = max(store, memory.shared)
                    used[one.pid] = sum(one.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    continue  # it has ended since it was listed
            peak = max(peak, total)

    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch)
        output, errors = process.communicate()
        over.set()
        watched.result()  # a figure of a watch that failed would be too small
    if process.returncode:
        raise RuntimeError(errors.decode()[-2000:])
    result: dict[str, Any] = json.loads(output.decode().splitlines()[-1])
    return result | {"peak_mb": peak / 2**20, "store_mb": store / 2**20, "cpu_s": sum(used.values())}


def peer_folder() -> Path:
    """A folder with the peer's library, beside our own environment; filled on first use."""
    cache = Path(os.environ.get("RAYLOOP_BENCH_CACHE", Path.home() / ".cache" / "rayloop-bench"))
    folder = cache / "curation-peer"
    if not (folder / "ready").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, PEER]
        subprocess.run([str(part) for part in command], check=True)
        (folder / "ready").touch()
    return folder


def peer_options() -> str:
    """What the peer needs to do the same: patterns and the settings of the sketches."""
    from cluster.settings.curation import DeduplicationSettings
    from data.recognisers import RECOGNISERS

    kinds = ("JWT", "API_KEY", "EMAIL", "IBAN", "IP", "CARD", "SSN", "PHONE")
    patterns = {r.kind: r.pattern.pattern for r in RECOGNISERS if r.kind in kinds}
    return json.dumps(DeduplicationSettings().model_dump() | {"patterns": patterns})


def main() -> int:
    """Ours at each size, the peer at one; prints rows a second, memory and the ratio of costs per row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--peer-rows", type=int, default=20_000)
    parser.add_argument("--events-per-block", type=int, default=50_000)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options.ours, options.events_per_block)))
        return 0
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    costs: dict[str, float] = {}
    cpu: dict[str, float] = {}
    distinct: dict[str, int] = {}
    peaks: dict[int, float] = {}
    for rows in sorted({*options.rows, options.peer_rows}):
        with tempfile.TemporaryDirectory() as folder:
            home, source = Path(folder) / "home", Path(folder) / "rows.parquet"
            fill(home, source, rows)
            blocks = ["--events-per-block", options.events_per_block]
            runs = {"ours": [sys.executable, "-m", "tests.bench.curation", "--ours", home, *blocks]}
            if rows == options.peer_rows:
                runs["peer"] = [sys.executable, "-c", PEER_CODE, source, Path(folder) / "out", CPUS, peer_options()]
            for side, command in runs.items():
                path = {"PYTHONPATH": f"{peer_folder()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
                found = measured(command, environment | (path if side == "peer" else {}))
                costs[f"{side} {rows}"] = found["seconds"] / rows
                cpu[f"{side} {rows}"] = found["cpu_s"] / rows
                if side == "ours":  # counted here, so that no memory of the measured processes is spent on it
                    found["distinct"] = distinct_questions(Path(found["path"]))
                    peaks[rows] = found["peak_mb"]
                distinct[f"{side} {rows}"] = found["distinct"]
                more = {name: found[name] for name in ("rows", "distinct") if name in found}
                print(
                    f"{side} {rows:>9,} rows: {found['seconds']:8.1f} s  {rows / found['seconds']:8,.0f} rows/s  "
                    f"{found['cpu_s']:7.0f} s cpu  peak {found['peak_mb']:7,.0f} MB and "
                    f"{found['store_mb']:,.0f} MB shared  {more}",
                    flush=True,
                )
    ratio = costs[f"peer {options.peer_rows}"] / costs[f"ours {max(options.rows)}"]
    of_cpu = cpu[f"peer {options.peer_rows}"] / cpu[f"ours {max(options.rows)}"]
    print(f"ratio of costs per row {ratio:.1f} x wall (target {TARGET:g} x), {of_cpu:.1f} x cpu")
    small, large = min(options.rows), max(options.rows)
    growth, memory = costs[f"ours {large}"] / costs[f"ours {small}"], peaks[large] / peaks[small]
    print(
        f"from {small:,} to {large:,} rows: {growth:.2f} x the cost per row, "
        f"{memory:.2f} x the memory (at most {FLAT:g} x)"
    )
    apart = abs(distinct[f"peer {options.peer_rows}"] / distinct[f"ours {options.peer_rows}"] - 1)
    print(f"distinct questions found differ by {apart:.2%} (at most {SAME:.0%})")
    return 1 if apart > SAME or memory > FLAT else 0


if __name__ == "__main__":
    sys.exit(main())
