"""What a trial is judged by: win rate on the validation split, and how far the model moved to get it.

Both compare with the model the training starts from (the base, or the adapter it goes on from). The KL
divergence is a Monte-Carlo estimate: answers are sampled from the trained model at temperature 1, and the
mean of log p_trained - log p_start over their tokens is reported, in nats a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.grading import Grader, make_grader
from train.evaluate.judges import ByReward
from train.evaluate.types import Truth


@dataclass(frozen=True)
class Target:
    """What every trial is measured on; made once, sent to all of them."""

    base_model: str
    init_adapter: str | None
    truths: tuple[Truth, ...]
    start_answers: tuple[str, ...]
    """Greedy answers of the model the trainings start from."""
    grader: dict[str, Any]
    max_new_tokens: int
    batch_size: int
    kl_samples: int
    kl_limit: float
    seed: int


@dataclass(frozen=True)
class Measurement:
    """How a model does on the target."""

    win_rate: float
    reward: float
    kl: float

    def score(self, kl_limit: float) -> float:
        """What the scheduler maximises: the win rate within the limit; beyond it, less than any within."""
        return self.win_rate if self.kl <= kl_limit else -(self.kl - kl_limit) / kl_limit


def measure(target: Target, adapter_dir: str, start: Any, threads: int = 0) -> Measurement:
    """Measure an adapter. `start` is the loaded `LocalModel` the training started from."""
    from train.generate import LocalModel, Sampling

    model = LocalModel(target.base_model, adapter_dir, threads=threads)
    prompts = [truth.prompt.messages for truth in target.truths]
    greedy = Sampling(target.max_new_tokens, 0.0, target.seed, target.batch_size)
    answers = [answer.text for answer in model.generate(prompts, greedy)]
    win_rate, reward = grade(make_grader(target.grader), target, answers)
    return Measurement(win_rate, reward, estimate_kl(model, start, prompts, target))


def grade(grader: Grader, target: Target, answers: Sequence[str]) -> tuple[float, float]:
    """Win rate against the start's answers (ties half) and mean reward; abstentions are left out.

    Raises:
        ValueError: the grader abstained on every prompt.
    """
    judge = ByReward(grader)
    rows = zip(target.truths, answers, target.start_answers, strict=True)
    outcomes = [judge.prefer(truth, mine, before) for truth, mine, before in rows]
    wins = [(outcome + 1) / 2 for outcome in outcomes if outcome is not None]
    rewards = [judge.reward(truth, mine) for truth, mine in zip(target.truths, answers, strict=True)]
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
