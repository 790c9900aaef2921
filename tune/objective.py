"""What a trial is judged by: how good it is, and what that costs.

A model that answers is judged by its win rate on the validation split and by how far it moved to get it. Both
compare with the model the training starts from (the base, or the adapter it goes on from). The KL divergence is a
Monte-Carlo estimate: answers are sampled from the trained model at temperature 1, and the mean of
log p_trained - log p_start over their tokens is reported, in nats a token.

A reward model is judged by its accuracy on held-out pairs or cards, and by how far its confidence is from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.grading import Grader, make_grader
from train.evaluate.judges import ByReward
from train.evaluate.types import Truth


@dataclass(frozen=True)
class Axes:
    """What the two numbers of a trial are."""

    value: str
    """Higher is better."""
    cost: str
    """Lower is better."""
    limit: float | None
    """Highest cost at which a configuration counts; `None` for any."""

    @property
    def names(self) -> tuple[str, str]:
        """Both in words."""
        return self.value.replace("_", " "), "KL (nats/token)" if self.cost == "kl" else self.cost.replace("_", " ")


def axes_of(method: str, kl_limit: float) -> Axes:
    """The axes for trials of a method."""
    if method == "reward":
        return Axes("pair_accuracy", "calibration_error", None)
    if method == "score_card":
        return Axes("accuracy", "calibration_error", None)
    return Axes("win_rate", "kl", kl_limit)


@dataclass(frozen=True)
class Target:
    """What trials of a model that answers are measured on; made once, sent to all of them."""

    base_model: str
    init_adapter: str | None
    truths: tuple[Truth, ...]
    grader: dict[str, Any]
    max_new_tokens: int
    batch_size: int
    kl_samples: int
    seed: int


@dataclass(frozen=True)
class Start:
    """The model the trainings start from: what every process that runs trials loads and asks once."""

    model: Any
    answers: tuple[str, ...]
    """Greedy, one a truth."""


def load_start(target: Target, threads: int = 0) -> Start:
    """Load it and have it answer."""
    from train.generate import LocalModel

    model = LocalModel(target.base_model, target.init_adapter, threads=threads)
    return Start(model, answers_of(model, target))


def answers_of(model: Any, target: Target) -> tuple[str, ...]:
    """Greedy answers of a loaded model, one a truth."""
    from train.generate import Sampling

    greedy = Sampling(target.max_new_tokens, 0.0, target.seed, target.batch_size)
    prompts = [truth.prompt.messages for truth in target.truths]
    return tuple(answer.text for answer in model.generate(prompts, greedy))


@dataclass(frozen=True)
class Measurement:
    """How a trial does."""

    value: float
    cost: float
    reward: float | None = None
    """Mean reward of the grader."""

    def score(self, limit: float | None) -> float:
        """What the scheduler maximises: the value within the limit; beyond it, less than any within."""
        return self.value if limit is None or self.cost <= limit else -(self.cost - limit) / limit


def measure(target: Target, adapter_dir: str, start: Start, threads: int = 0) -> Measurement:
    """Measure an adapter against the start."""
    from train.generate import LocalModel

    model = LocalModel(target.base_model, adapter_dir, threads=threads)
    win_rate, reward = grade(make_grader(target.grader), target.truths, answers_of(model, target), start.answers)
    prompts = [truth.prompt.messages for truth in target.truths]
    return Measurement(win_rate, estimate_kl(model, start.model, prompts, target), reward)


def measure_scorer(method: str, adapter_dir: str, base_model: str, validation: Any, encoder: Any) -> Measurement:
    """Measure a reward model on held-out pairs or cards, given as a table.

    Raises:
        ValueError: there are none.
    """
    from train.calibration import calibrate
    from train.score_card import report_on_cards
    from train.scorer import LocalScorer

    model = LocalScorer(Path(adapter_dir), base_model).model
    if method == "reward":
        found = calibrate(model, encoder, validation)
        if found.pair_accuracy is None or found.calibration_error is None:
            raise ValueError("the validation split holds no pairs to judge a reward model by")
        return Measurement(found.pair_accuracy, found.calibration_error)
    heads = report_on_cards(model, encoder.cards(validation).rows).heads.values()
    cards = sum(head.cards for head in heads)
    if not cards:
        raise ValueError("the validation split holds no score cards to judge a reward model by")
    accuracy = sum(head.accuracy * head.cards for head in heads) / cards
    return Measurement(accuracy, sum(head.calibration_error * head.cards for head in heads) / cards)


def grade(
    grader: Grader, truths: Sequence[Truth], answers: Sequence[str], start_answers: Sequence[str]
) -> tuple[float, float]:
    """Win rate against the start's answers (ties half) and mean reward; abstentions are left out.

    Raises:
        ValueError: the grader abstained on every prompt.
    """
    judge = ByReward(grader)
    rows = zip(truths, answers, start_answers, strict=True)
    outcomes = [judge.prefer(truth, mine, before) for truth, mine, before in rows]
    wins = [(outcome + 1) / 2 for outcome in outcomes if outcome is not None]
    rewards = [judge.reward(truth, mine) for truth, mine in zip(truths, answers, strict=True)]
    graded = [reward for reward in rewards if reward is not None]
    if not wins or not graded:
        raise ValueError("the grader abstained on every validation prompt")
    return sum(wins) / len(wins), sum(graded) / len(graded)


def estimate_kl(model: Any, start: Any, prompts: Sequence[Any], target: Target) -> float:
    """Mean of log p(model) - log p(start) over tokens sampled from `model`, in nats."""
    from data.template import render
    from train.generate import Sampling, end_tokens, score

    sampling = Sampling(target.max_new_tokens, 1.0, target.seed, target.batch_size)
    sampled = model.generate(prompts, sampling, num_samples=target.kl_samples)
    asked = [render(model.tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    repeated = [ids for ids in asked for _ in range(target.kl_samples)]
    end = end_tokens(model.model, model.tokenizer)[:1]
    pairs = [
        (ids, answer.token_ids + (end if answer.finished else []))
        for ids, answer in zip(repeated, sampled, strict=True)
    ]
    pairs = [(ids, written) for ids, written in pairs if written]
    if not pairs:
        return 0.0
    own = score(model.model, pairs, target.batch_size)
    before = score(start.model, pairs, target.batch_size)
    moved = sum(a.total - b.total for a, b in zip(own, before, strict=True))
    return moved / sum(a.tokens for a in own)
