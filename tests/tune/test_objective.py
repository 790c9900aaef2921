"""Win rate against the start, and the KL estimate on a real tiny model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.grading import make_grader
from tests.train.evaluate.fakes import answer_json, make_truths
from tune.objective import Measurement, Target, estimate_kl, grade

TARGET = Target(
    base_model="",
    init_adapter=None,
    truths=tuple(make_truths(4)),
    grader={"type": "dataset_label"},
    max_new_tokens=16,
    batch_size=32,
    kl_samples=4,
    seed=0,
)
START_ANSWERS = (answer_json("benign"),) * 2 + (answer_json("malicious"),) * 2


def test_grade_counts_wins_against_the_start() -> None:
    grader = make_grader(TARGET.grader)
    assert grade(grader, TARGET.truths, START_ANSWERS, START_ANSWERS) == (0.5, 0.75)
    assert grade(grader, TARGET.truths, [answer_json("benign")] * 4, START_ANSWERS) == (0.75, 1.0)
    blank = [replace(truth, reference=" ") for truth in TARGET.truths]
    with pytest.raises(ValueError, match="abstained on every"):
        grade(grader, blank, START_ANSWERS, START_ANSWERS)


def test_score_prefers_any_trial_within_the_limit() -> None:
    near, far, farther = Measurement(0.3, 0.1), Measurement(0.9, 0.11), Measurement(1.0, 0.5)
    assert near.score(0.1) == 0.3
    assert near.score(0.1) > far.score(0.1) > farther.score(0.1)


def test_kl_is_zero_for_the_same_model_and_matches_a_known_shift(toy_base: Path) -> None:
    import torch

    from train.generate import LocalModel

    start, other = LocalModel(toy_base), LocalModel(toy_base)
    prompts = [truth.prompt.messages for truth in TARGET.truths]
    assert estimate_kl(start, start, prompts, TARGET) == 0.0

    class Shifted(torch.nn.Module):
        """The start model with every logit times two: a sharper distribution."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = other.model
            self.config, self.generation_config = self.inner.config, self.inner.generation_config
            self.device = self.inner.device

        def forward(self, **inputs: object) -> SimpleNamespace:
            return SimpleNamespace(logits=2 * self.inner(**inputs).logits)

    other.model = Shifted()
    many = replace(TARGET, kl_samples=64)
    estimate = estimate_kl(other, start, prompts, many)
    assert 0.005 < estimate < 0.3
    assert estimate == pytest.approx(_exact_kl(other, start, prompts, many), abs=0.03)


def _exact_kl(model, start, prompts, target) -> float:  # type: ignore[no-untyped-def]
    """Sum over the vocabulary at every sampled position: the same expectation with less noise."""
    import torch

    from data.template import render
    from train.generate import Sampling

    sampling = Sampling(target.max_new_tokens, 1.0, 99, target.batch_size)
    total, tokens = 0.0, 0
    answers = model.generate(prompts, sampling, num_samples=16)
    for index, answer in enumerate(answers):
        asked = render(model.tokenizer, prompts[index // 16], add_generation_prompt=True)
        ids = torch.tensor([asked + answer.token_ids])
        with torch.inference_mode():
            own = torch.log_softmax(model.model(input_ids=ids).logits, -1)[0, len(asked) - 1 :]
            before = torch.log_softmax(start.model(input_ids=ids).logits, -1)[0, len(asked) - 1 :]
        rows = own if answer.finished else own[:-1]
        total += float((rows.exp() * (rows - before[: len(rows)])).sum())
        tokens += len(rows)
    return total / tokens
