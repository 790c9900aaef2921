"""A toy dataset and short configurations for the training tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import load_settings
from tests.toys import toy_feedback, write_dataset
from train.config import TrainConfig, resolve_config

RATES = {"sft": 5e-3, "dpo": 5e-3, "kto": 2e-3, "reward": 5e-3, "score_card": 5e-3, "grpo": 5e-3}
GRADER = {"type": "dataset_label", "name": "recorded_truth"}


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Feedback on a hundred and sixty questions, as a curated dataset."""
    return write_dataset(tmp_path_factory.mktemp("data") / "toy-feedback", toy_feedback(160, seed=3))


@pytest.fixture
def config_of(toy_base: Path, toy_dataset: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes short configurations on the toy base: `config_of("dpo", seed=1)`."""
    settings, _ = load_settings(home=tmp_path / "home")

    def make(method: str, **overrides: Any) -> TrainConfig:
        short: dict[str, Any] = {
            "base_model": str(toy_base),
            "dataset": toy_dataset,
            "out": tmp_path / "out",
            "learning_rate": RATES[method],
            "epochs": 2,
            "batch_size": 20,
            "gradient_accumulation": 1,
            "threads": 1,
            "max_length": 256,
        }
        if method == "grpo":
            short |= {"batch_size": 32, "group_size": 8, "max_completion_tokens": 32, "epochs": 1, "grader": GRADER}
        return resolve_config(settings, method, **(short | overrides))

    return make
