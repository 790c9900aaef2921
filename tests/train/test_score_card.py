"""The reward model with four heads: what it learns from score cards, and what it says of itself."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from cluster.errors import DatasetError
from cluster.settings import load_settings
from cluster.settings.training import HeadWeights
from data.grading import AtHand, make_grader
from tests.toys import toy_answer, toy_examples, toy_feedback, write_dataset
from train.config import TrainConfig, resolve_config
from train.examples import HEADS, with_scores
from train.run import TrainResult, train
from train.score_card import measure_cards, one_reward, score_card_loss
from train.scorer import LocalScorer

ASKED = [{"role": "user", "content": "service=api level=dead hour=3"}]


def cards(count: int) -> list[dict[str, Any]]:
    """Answers as reviewers judge them: right ones succeed, those of `mail` are rude, and nobody looks at safety."""
    rows = []
    for number, (prompt, right) in enumerate(toy_examples(count, seed=3)):
        service = json.loads(right["content"])["owner"]
        wrong = number % 2 == 1
        content = toy_answer("nobody", "low") if wrong else right["content"]
        card = {"success": 0.0 if wrong else 1.0, "tone": 0.1 if service == "mail" else 0.9, "explicit": 0.5}
        base = {"user_id": f"u{number % 20}", "interaction_ids": [f"i{number}"], "cluster_id": f"c{number}"}
        base |= {"example_id": f"r{number:05d}", "agent": "triage", "order": 0.0, "origin": "label", "weight": 1.0}
        answer = json.dumps([{"role": "assistant", "content": content}])
        rows.append(
            {
                **base,
                "prompt": json.dumps([prompt]),
                "response": answer,
                "reward": 0.5,
                "score_card": json.dumps(card if number % 10 else {"explicit": 0.5}),
                "category": "mail" if service == "mail" else None,
            }
        )
    return rows


@pytest.fixture(scope="module")
def trained(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Trained on cards in which tone counts three times as much as success."""
    root = tmp_path_factory.mktemp("cards")
    dataset = write_dataset(root / "data", {**toy_feedback(4), "reward": cards(240)})
    settings, _ = load_settings(home=root / "home")
    weights = {"success": 1, "helpfulness": 0, "tone": 3, "safety": 0}
    shape = {"learning_rate": 1e-2, "epochs": 6, "batch_size": 20, "gradient_accumulation": 1, "threads": 1}
    places = {"base_model": str(toy_base), "dataset": dataset, "out": root / "out"}
    config = resolve_config(settings, "score_card", **shape, **places, max_length=256, head_weights=weights)
    return train(config)


def test_heads_learn_what_reviewers_judge_and_report_by_category(trained: TrainResult) -> None:
    metrics = trained.metrics
    assert metrics["heldout/success_accuracy"] > 0.9 and metrics["heldout/tone_accuracy"] > 0.9
    assert metrics["heldout/tone_mean_error"] < 0.2 and metrics["heldout/success_calibration_error"] < 0.2
    assert metrics["heldout/tone_accuracy_on_mail"] > 0.8 and "heldout/tone_accuracy_on_unnamed" in metrics
    assert not any(name.startswith("heldout/safety") for name in metrics)  # nobody judged it
    report = trained.adapter_dir.parent / "report"
    assert {file.name for file in report.iterdir()} == {"calibration.json", "calibration.png"}
    assert set(json.loads((report / "calibration.json").read_text())["heads"]) == {"success", "tone"}


def test_its_weighted_mean_is_a_graders_reward(trained: TrainResult) -> None:
    scorer = LocalScorer(trained.adapter_dir)
    grader = make_grader(
        {"type": "reward_model", "adapter_sha256": scorer.adapter_sha256}, at_hand=AtHand(scorer=scorer)
    )

    def reward(service: str, answer: str) -> float:
        asked = [{"role": "user", "content": f"service={service} level=dead hour=3"}]
        found = grader.grade({"messages": asked}, {"output_text": answer}).reward
        assert found is not None
        return found

    right, rude = reward("api", toy_answer("api", "dead")), reward("mail", toy_answer("mail", "dead"))
    wrong = reward("api", toy_answer("nobody", "low"))
    assert right > wrong > rude  # 0.93, 0.68 and 0.33 on the cards: tone weighs most


def test_loss_and_weighted_mean_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3), 5.0, 1.0]])
    scores = torch.tensor([[0.25, 1.0, float("nan"), 0.0]])
    # cross-entropies ln 2 and ln(4/3); the third has no score, the fourth no weight
    expected = (2 * math.log(2) + 1 * math.log(4 / 3)) / 3
    assert score_card_loss(logits, scores, torch.tensor([2.0, 1.0, 4.0, 0.0])).item() == pytest.approx(expected)
    weights = {"success": 1.0, "helpfulness": 3.0, "tone": 0.0, "safety": 0.0}
    mean = (0.5 + 3 * 0.75) / 4
    assert one_reward([0.0, math.log(3), 9.0, 9.0], weights) == pytest.approx(math.log(mean / (1 - mean)))


def test_measures_by_hand() -> None:
    nan = float("nan")
    predicted = np.array([[0.9, 0.2, 0.5, 0.5], [0.4, 0.9, 0.5, 0.5]])
    found = measure_cards(predicted, np.array([[1.0, 0.6, nan, nan], [0.8, nan, nan, nan]]), ["a", None])
    assert set(found.heads) == {"success", "helpfulness"}
    success = found.heads["success"]
    assert (success.mean_error, success.accuracy, success.cards) == (pytest.approx(0.25), 0.5, 2)
    assert success.calibration_error == pytest.approx((0.1 + 0.4) / 2)
    assert found.by_category == {"a": {"success": 1.0, "helpfulness": 0.0}, "unnamed": {"success": 0.0}}


def test_cards_without_any_of_the_four_teach_nothing(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    rows = [{**row, "score_card": json.dumps({"explicit": 0.5})} for row in cards(20)]
    folder = write_dataset(tmp_path / "data", {**toy_feedback(4), "reward": rows})
    with pytest.raises(DatasetError, match="no score cards of reviewers; label some answers"):
        train(config_of("score_card", dataset=folder))
    table = pa.table({"score_card": ['{"tone": 1}', '{"grade": 1}', None]})
    assert with_scores(table).num_rows == 1


def test_weights_must_leave_something_to_learn() -> None:
    with pytest.raises(ValidationError, match="needs a weight above 0"):
        HeadWeights(**dict.fromkeys(HEADS, 0.0))
