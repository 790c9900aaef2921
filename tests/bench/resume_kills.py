"""Trainings ended by SIGKILL at any moment, each as often as it takes, while somebody reads what they leave.

    python -m tests.bench.resume_kills [--times 20] [--seed 0]

A training runs in a process of its own, as `rayloop train run` has it run, and is killed after a time drawn at random:
half of the kills fall anywhere in the run, half after its last step, where the result is measured and written. Another
process goes on, until one ends by itself. The result must then be that of an undisturbed run, with nothing left beside
it; a reader that loads `adapter/` all the while must never find it torn, or gone once it was there. Prints a line for
each training; exit code 1 on any difference.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from cluster.errors import RayloopError
from cluster.model_files import adapter_digest
from cluster.settings import load_settings
from cluster.settings.training import ToySettings
from tests.toys import toy_examples, toy_feedback, write_dataset
from train.config import TrainConfig, resolve_config
from train.run import finished_result
from train.toy import build_toy_base

STEPS = 10
LIVES = 30  # a training that has been started so often and has not ended never will
CHILD = """
import sys
from pathlib import Path
from train.config import TrainConfig
from train.imports import import_trainers
from train.worker import run_here

import_trainers()
config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())


def say(event):
    if event.kind in ("begin", "fail") or (event.kind == "progress" and event.step == event.steps):
        print(event.kind, event.error or "", flush=True)


run_here([config], say)
"""
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"epochs": 3},
    "kto": {"epochs": 3},
    "reward": {},
    "grpo": {"batch_size": 64, "max_completion_tokens": 32, "grader": {"type": "dataset_label"}},
}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run."""

    digest: str
    run_s: float
    """From its begin to its last step."""
    end_s: float
    """From there to its end."""


@dataclass
class Reader:
    """Loads an adapter again and again, as an engine would that does not wait to be told."""

    folder: Path
    digest: str
    wrong: list[str] = field(default_factory=list)
    times: int = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read while the block runs."""
        ended = threading.Event()
        thread = threading.Thread(target=self._read, args=(ended,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _read(self, ended: threading.Event) -> None:
        seen = False
        while not ended.wait(0.002):
            if not seen and not self.folder.exists():
                continue
            seen = True
            try:
                load_file(self.folder / "adapter_model.safetensors")
                found = adapter_digest(self.folder)
            except (OSError, SafetensorError, RayloopError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                continue
            self.times += 1
            if found != self.digest:
                self.wrong.append(f"an adapter {found[:12]} that no run should have made")


def start(config: TrainConfig) -> subprocess.Popen[str]:
    """A process that trains, or goes on."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    file = config.out.parent / f"{config.out.name}.json"
    file.write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdout=subprocess.PIPE, text=True, env=environment
    )


def wait_for(process: subprocess.Popen[str], word: str) -> bool:
    """True once the process has said it; false when it ends without."""
    assert process.stdout is not None
    return any(line.split()[0] == word for line in process.stdout)


def run_whole(config: TrainConfig) -> Whole:
    """Train undisturbed, in a process as well, and time it."""
    with start(config) as process:
        assert wait_for(process, "begin")
        begun = time.monotonic()
        assert wait_for(process, "progress")
        stepped = time.monotonic()
        process.wait()
    done = finished_result(config)
    assert done is not None, "an undisturbed run did not end well"
    return Whole(done["adapter_sha256"], stepped - begun, time.monotonic() - stepped)


def live(config: TrainConfig, whole: Whole, random: Random) -> bool:
    """One life: a process that is killed after a time, or ends by itself before (true)."""
    with start(config) as process:
        if not wait_for(process, "begin"):
            return process.wait() == 0
        if random.random() < 0.5:
            wait_s = random.uniform(0, whole.run_s + whole.end_s)
        else:
            wait_for(process, "progress")
            wait_s = random.uniform(0, whole.end_s)
        try:
            return process.wait(wait_s) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return False


def kill_until_done(config: TrainConfig, whole: Whole, random: Random) -> tuple[int, list[str], int]:
    """How often it was killed, what was wrong, and how often the reader read."""
    reader = Reader(config.out / "adapter", whole.digest)
    with reader.reading():
        kills = next((kills for kills in range(LIVES) if live(config, whole, random)), LIVES)
        time.sleep(0.05)  # the reader sees the end
    done, wrong = finished_result(config), reader.wrong
    if done is None or done["adapter_sha256"] != whole.digest:
        wrong = [*wrong, f"the result is {done and done['adapter_sha256'][:12]}, not {whole.digest[:12]}"]
    left = sorted({path.name for path in config.out.iterdir()} - {"adapter", "report", "result.json"})
    if left:
        wrong = [*wrong, f"{', '.join(left)} left behind"]
    return kills, wrong, reader.times


def main() -> int:
    """Kill as often as asked, over the methods in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random, wholes, kills, bad = Random(asked.seed), dict[str, Whole](), 0, 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shape = ToySettings(hidden=64, layers=2, heads=2, intermediate=160, vocab=340, epochs=4, batch_size=32)
        build_toy_base(root / "base", toy_examples(600, seed=1, outdated=0.8), shape)
        write_dataset(root / "data", toy_feedback(160, seed=3))
        number = 0
        while kills < asked.times:
            method = list(METHODS)[number % len(METHODS)]
            if method not in wholes:
                wholes[method] = run_whole(_config(root, method, root / f"whole-{method}"))
            config = _config(root, method, root / f"killed-{number}")
            killed, wrong, read = kill_until_done(config, wholes[method], random)
            number, kills, bad = number + 1, kills + killed, bad + bool(wrong)
            print(f"{method:<7} killed {killed:>2} times, read {read:>4} times: {'; '.join(wrong) or 'the same'}")
            shutil.rmtree(config.out)
    print(f"{kills} kills in {number} trainings, {bad} of them with a difference")
    return 1 if bad else 0


def _config(root: Path, method: str, out: Path) -> TrainConfig:
    settings, _ = load_settings(home=root / "home")
    common: dict[str, Any] = {"learning_rate": 5e-3, "epochs": 2, "batch_size": 20, "gradient_accumulation": 1}
    common |= {"max_steps": STEPS, "save_steps": 3, "eval_steps": 2, "threads": 1, "max_length": 256}
    places = {"base_model": str(root / "base"), "dataset": root / "data", "out": out}
    return resolve_config(settings, method, **(common | places | METHODS[method]))


if __name__ == "__main__":
    sys.exit(main())
