"""Trainings that are killed at any step and go on: `python -m tests.train.killing --times 20`.

Each time a process trains, is ended with SIGKILL once it has said that it reached a step drawn at random,
and another goes on from the last whole checkpoint. The result must have the digest of an undisturbed run,
and nothing half-written may ever be visible.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from cluster.settings import load_settings
from cluster.settings.training import ToySettings
from tests.toys import toy_examples, toy_feedback, write_dataset
from train.checkpoint import last_checkpoint
from train.config import TrainConfig, resolve_config
from train.run import train
from train.toy import build_toy_base

CHILD = """
import sys
from pathlib import Path
from train.config import TrainConfig
from train.run import train

class Tell:
    def progress(self, step, steps, values):
        print("step", step, flush=True)
        if step >= int(sys.argv[2]):
            sys.stdin.read()  # waits here for its end
    def checkpoint(self, folder, step):
        pass

train(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()), reporter=Tell())
"""
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"epochs": 3},
    "kto": {"epochs": 3},
    "reward": {},
    "grpo": {"batch_size": 64, "max_completion_tokens": 32, "grader": {"type": "dataset_label"}},
}


def train_and_kill(config: TrainConfig, step: int) -> None:
    """Train in another process and end it with SIGKILL when it has reached `step`."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    file = config.out.parent / f"{config.out.name}.json"
    file.write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), str(step)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdin is not None
    reached = any(line.split() == ["step", str(step)] for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    assert reached, f"the training ended before step {step}"


def check_nothing_half_written(config: TrainConfig) -> None:
    """No result, and every checkpoint that can be seen is whole."""
    assert not (config.out / "adapter").exists() and not (config.out / "model").exists()
    for folder in (config.out / "checkpoints").glob("step-*"):
        names = {path.name for path in folder.iterdir()}
        assert {"state.json", "optimizer.safetensors", "random.safetensors", "trainer_state.json"} <= names


def main() -> None:
    """Kill as often as asked, over the methods in turn; prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random, whole = Random(asked.seed), {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shape = ToySettings(hidden=64, layers=2, heads=2, intermediate=160, vocab=340, epochs=4, batch_size=32)
        build_toy_base(root / "base", toy_examples(600, seed=1, outdated=0.8), shape)
        write_dataset(root / "data", toy_feedback(160, seed=3))
        for number in range(asked.times):
            method = list(METHODS)[number % len(METHODS)]
            if method not in whole:
                whole[method] = train(_config(root, method, root / f"whole-{method}")).adapter_sha256
            step = random.randint(1, 9)
            config = _config(root, method, root / f"killed-{number}")
            train_and_kill(config, step)
            check_nothing_half_written(config)
            found = last_checkpoint(config.out / "checkpoints")
            same = train(config, resume_from=found).adapter_sha256 == whole[method]
            print(f"{number + 1:>3} {method:<7} killed at step {step}, from {found and found.name}: same {same}")
            assert same
            shutil.rmtree(config.out)


def _config(root: Path, method: str, out: Path) -> TrainConfig:
    settings, _ = load_settings(home=root / "home")
    common: dict[str, Any] = {"learning_rate": 5e-3, "epochs": 2, "batch_size": 20, "gradient_accumulation": 1}
    common |= {"max_steps": 10, "save_steps": 3, "eval_steps": 2, "threads": 1, "max_length": 256}
    places = {"base_model": str(root / "base"), "dataset": root / "data", "out": out}
    return resolve_config(settings, method, **(common | places | METHODS[method]))


if __name__ == "__main__":
    main()
