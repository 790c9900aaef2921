"""A sweep of sixteen configurations that is killed on the way: does it find the one that learns?

Fifteen of the sixteen learning rates are too small to learn anything, so what wins is known before. The sweep runs in
a process of its own and is killed with all its actors once a trial, drawn at random, has ended; then it is resumed
here. The winner must be the planted one, and MLflow must hold sixteen nested runs that ended well.

Run: `python -m tests.bench.sweep_resume [--seed 0]`.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

TRIALS, PLANTED = 16, 1e-2


def settings_of(home: Path) -> Any:
    """Short trainings; the KL limit is out of the way."""
    from cluster.settings import load_settings

    training = {"batch_size": 32, "gradient_accumulation": 1, "warmup_steps": 2, "dpo": {"epochs": 1}}
    sweep = {"validation_prompts": 32, "kl_samples": 1, "kl_limit": 50}
    more: dict[str, Any] = {"evaluation": {"max_new_tokens": 24}, "ray": {"num_cpus": 4}}
    return load_settings(home=home, training=training, sweep=sweep, **more)[0]


def sweep_of(settings: Any, base: Path, seed: int) -> Any:
    """All rates in an order drawn by the seed."""
    from tune.spec import new_sweep

    rates = [PLANTED, *(f"{n}e-10" for n in range(1, TRIALS))]
    Random(seed).shuffle(rates)
    ranges = {"learning_rate": ",".join(map(str, rates)), "beta": "0.1"}
    return new_sweep(
        settings, method="dpo", dataset="latest", base=str(base), ranges=ranges, grid=True, scheduler="none"
    )


def build(root: Path) -> None:
    """A toy base and people's feedback on it."""
    from cluster.settings.training import ToySettings
    from tests.datasets import write_feedback_dataset
    from tests.toys import toy_examples
    from train.toy import build_toy_base

    shape = ToySettings(hidden=64, layers=2, heads=2, intermediate=160, vocab=340, epochs=12, learning_rate=3e-3)
    build_toy_base(root / "base", toy_examples(600, seed=1, outdated=0.8), shape)
    write_feedback_dataset(root / "home" / "datasets", users=60)


def killed_after(command: list[str], place: Path, ended: int) -> int:
    """Run a sweep, kill it and its actors when so many trials have ended; returns how many had."""
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    count = 0
    while count < ended and process.poll() is None:
        time.sleep(0.05)
        count = len(list(place.glob("*/trials/*/adapter")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return count


def main() -> int:
    """Kill, resume, and look; 1 when the winner is another or a run is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.root:
        from tune.sweep import run_sweep

        settings = settings_of(asked.root / "home")
        run_sweep(settings, sweep_of(settings, asked.root / "base", asked.seed))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return bench(Path(folder), asked.seed)


def bench(root: Path, seed: int) -> int:
    """One killed and resumed sweep."""
    from cluster import tracking
    from tune.sweep import resume_sweep

    build(root)
    settings, place = settings_of(root / "home"), root / "home" / "sweeps"
    after = Random(seed).randrange(1, TRIALS)
    command = [sys.executable, "-m", "tests.bench.sweep_resume", "--seed", str(seed), "--root", str(root)]
    begun = time.perf_counter()
    count = killed_after(command, place, after)
    print(f"killed after {count} of {TRIALS} trials, {time.perf_counter() - begun:.0f} s", flush=True)
    found = resume_sweep(settings, next(place.iterdir()).name)
    client = tracking.client(settings)
    experiment = client.get_run(found.run_id).info.experiment_id
    nested = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{found.run_id}'")
    ended = sum(run.info.status == "FINISHED" for run in nested)
    values = sorted(((t.value or 0.0, t.config["learning_rate"]) for t in found.trials), reverse=True)
    winner = found.chosen.config["learning_rate"] if found.chosen else None
    print(
        f"{len(found.trials)} trials, {len(nested)} nested runs, {ended} of them finished; {found.seconds:.0f} s more"
    )
    print(f"winner: learning rate {winner} with win rate {values[0][0]:.3f}; the next has {values[1][0]:.3f}")
    whole = len(found.trials) == len(nested) == ended == TRIALS
    return 0 if whole and count < TRIALS and winner == PLANTED else 1


if __name__ == "__main__":
    sys.exit(main())
