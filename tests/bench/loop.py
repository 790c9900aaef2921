"""The whole loop over several seeds: does an agent get better from its traffic, and only from true feedback?

    python -m tests.bench.loop [--seeds 41 42 43] [--shuffled 24] [--within 300] [--points 10]

Each seed is one `rayloop demo` with its own folder: base model, traffic, curation, sweep, training, evaluation,
canary, promotion, then a damaged version that must be rolled back. The `--shuffled` seeds run with
`--shuffle-feedback` and must promote nothing. Prints a row a run; exit code 1 when a seed gains fewer points on
held-out alerts, takes longer than `--within` seconds from base to promotion, or ends otherwise than it should.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(seed: int, home: Path, *more: str) -> dict[str, Any]:
    """The summary of one demo, with its exit code."""
    command = [sys.executable, "-m", "cluster", "demo", "--seed", str(seed), "--home", str(home), *more]
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    summary = home / "summary.json"
    return {"exit_code": code} | (json.loads(summary.read_text()) if summary.exists() else {})


def faults(found: dict[str, Any], points: float, within_s: float) -> list[str]:
    """What a run with true feedback misses."""
    if found["exit_code"]:
        return [f"exit code {found['exit_code']}: {found.get('inconclusive')}"]
    gained = 100 * (found["promoted_accuracy"] - found["base_accuracy"])
    told = [] if gained >= points else [f"only {gained:.1f} points gained"]
    return told + ([] if found["loop_seconds"] <= within_s else [f"the loop took {found['loop_seconds']:.0f} s"])


def main() -> int:
    """One demo after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="*", default=[41, 42, 43])
    parser.add_argument("--shuffled", type=int, nargs="*", default=[24], help="seeds with shuffled feedback")
    parser.add_argument("--within", type=float, default=300.0, help="seconds")
    parser.add_argument("--points", type=float, default=10.0)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            found = run(seed, Path(folder) / f"true-{seed}")
            told = faults(found, options.points, options.within)
            failed |= bool(told)
            print(f"seed {seed}: {json.dumps(found)}\n  {'; '.join(told) or 'as it should'}", flush=True)
        for seed in options.shuffled:
            found = run(seed, Path(folder) / f"shuffled-{seed}", "--shuffle-feedback")
            wrong = bool(found["exit_code"]) or found.get("promoted_version") is not None
            failed |= wrong
            print(f"seed {seed}, shuffled: {json.dumps(found)}\n  {'PROMOTED' if wrong else 'nothing promoted'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
