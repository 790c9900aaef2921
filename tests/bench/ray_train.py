"""What Ray Train costs: the same training as a plain function and in a Ray Train worker.

    python -m tests.bench.ray_train [--steps 150] [--repeats 3]

Each side runs in a process of its own, in turn, and both must leave the same adapter. A ten-minute run is not made
but computed, openly: what a run pays once (measured as everything outside the trainer's own clock: starting a
worker, importing, reading data, reporting back) and what it pays for each step are taken apart, and the second is
multiplied to ten minutes. Starting a cluster is shown apart, since `rayloop up` has one running.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET_SHARE = 0.03
RUN_S = 600.0
PLAIN, RAY = "plain function", "Ray Train"
SETTLE_S = 5.0  # a cluster that runs has long started the processes it keeps ready


def build(root: Path) -> None:
    """A toy base and feedback for it."""
    from cluster.settings.training import ToySettings
    from tests.toys import toy_examples, toy_feedback, write_dataset
    from train.toy import build_toy_base

    build_toy_base(root / "base", toy_examples(400, seed=1), ToySettings(epochs=1, vocab=400))
    write_dataset(root / "data", toy_feedback(400, seed=3))


def measure(side: str, root: Path, steps: int) -> dict[str, Any]:
    """Seconds of one run on this side, and the digest of its adapter."""
    from contextlib import nullcontext

    from cluster.runtime import ray_session
    from cluster.settings import load_settings
    from train.config import resolve_config
    from train.mailbox import Event
    from train.worker import run_here, run_on_ray

    settings, _ = load_settings(home=root / "home")
    cores = len(os.sched_getaffinity(0))
    out = root / f"out-{side.replace(' ', '-')}-{time.time_ns()}"
    shape = {"batch_size": 16, "gradient_accumulation": 1, "epochs": 100.0, "max_steps": steps, "threads": cores}
    config = resolve_config(settings, "sft", base_model=str(root / "base"), dataset=root / "data", out=out, **shape)
    found: dict[str, Any] = {}

    def listen(event: Event) -> None:
        if event.kind == "begin":
            found["start_s"] = time.perf_counter() - begun
        if event.values and "train_runtime" in event.values:
            found["trainer_s"] = event.values["train_runtime"]
        if event.result is not None:
            found["told_s"] = time.perf_counter() - begun
            found["adapter"] = event.result["adapter_sha256"]
        if event.error is not None:
            raise event.error

    begun = time.perf_counter()
    with ray_session(settings, num_cpus=4) if side == RAY else nullcontext():
        found["cluster_s"] = time.perf_counter() - begun
        time.sleep(SETTLE_S if side == RAY else 0)
        begun = time.perf_counter()
        if side == RAY:
            run_on_ray([config], workers=1, max_failures=0, on_event=listen)
        else:
            run_here([config], listen)
        ended = time.perf_counter()
    found["once_s"] = ended - begun - found["trainer_s"]
    found["end_s"] = ended - begun - found.pop("told_s")
    return found


def main() -> int:
    """Run both in turn; 1 when their adapters differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(measure(asked.side, asked.root, asked.steps)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {PLAIN: [], RAY: []}
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        for _ in range(asked.repeats):
            for side, found in runs.items():
                command = [sys.executable, "-m", "tests.bench.ray_train", "--steps", str(asked.steps)]
                child = subprocess.run(
                    [*command, "--side", side, "--root", name],
                    env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                found.append(json.loads(child.stdout.splitlines()[-1]))
    return report(asked.steps, runs)


def report(steps: int, runs: dict[str, list[dict[str, Any]]]) -> int:
    """Print medians and the share of a ten-minute run."""
    kinds = ("trainer_s", "once_s", "start_s", "end_s")
    median = {side: {k: statistics.median(run[k] for run in found) for k in kinds} for side, found in runs.items()}
    for side, values in median.items():
        step_ms = 1000 * values["trainer_s"] / steps
        print(
            f"{side:14} once {values['once_s']:6.2f} s (until it begins {values['start_s']:.2f} s, after its end "
            f"{values['end_s']:.2f} s)   a step {step_ms:7.2f} ms  ({steps} steps)"
        )
    once_s = median[RAY]["once_s"] - median[PLAIN]["once_s"]
    slower = median[RAY]["trainer_s"] / median[PLAIN]["trainer_s"] - 1
    cluster_s = statistics.median(run["cluster_s"] for run in runs[RAY])
    share = once_s / RUN_S + slower
    print(f"once more {once_s:+.2f} s, each step {slower:+.2%}; starting a cluster, where none runs: {cluster_s:.2f} s")
    print(f"of a {RUN_S:g} s run: {share:.2%}, with the cluster's start {share + cluster_s / RUN_S:.2%}", end=" ")
    print(f"(target <= {TARGET_SHARE:.0%})")
    same = len({run["adapter"] for found in runs.values() for run in found}) == 1
    print(f"the same adapter from all runs: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
