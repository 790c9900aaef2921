"""A grader as the reward of GRPO, and the mean reward of a model's answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.grading import AtHand, make_grader
from data.grading.reward_model import HttpScorer, Scorer

Sample = dict[str, Any]
"""An answer as a grader sees it: `output_text`, and `output_tools` of an agent with tools."""
RewardFunction = Callable[..., list[float | None]]


def reward_function(config: Mapping[str, Any], reward_model: str | None) -> RewardFunction:
    """What TRL calls with the sampled answers: a reward in [0, 1] each, `None` where the grader abstains.

    Raises:
        InputError: the configuration is no grader.
    """
    grade = answer_grader(config, reward_model)

    def grader(
        completions: Sequence[str],
        item: Sequence[str],
        log_metric: Callable[[str, float], None],
        sample: Sequence[Sample | None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        rewards = grade(item, [{"output_text": text} for text in completions] if sample is None else sample)
        log_metric("abstained", sum(reward is None for reward in rewards) / len(rewards))
        return rewards

    return grader


def answer_grader(
    config: Mapping[str, Any], reward_model: str | None
) -> Callable[[Sequence[str], Sequence[Sample | None]], list[float | None]]:
    """A function from items (JSON text) and samples to rewards; no sample, no reward."""
    made = make_grader(config, field="training.grpo.grader", at_hand=AtHand(scorer=open_scorer(reward_model)))

    def grade(items: Sequence[str], samples: Sequence[Sample | None]) -> list[float | None]:
        pairs = zip(items, samples, strict=True)
        return [None if sample is None else made.grade(json.loads(item), sample).reward for item, sample in pairs]

    return grade


def open_scorer(reward_model: str | None) -> Scorer | None:
    """The reward model at an address, or in a folder; `None` where none is named.

    Raises:
        UnavailableError: nobody answers at the address.
        InputError: the folder holds no reward model.
    """
    if reward_model is None:
        return None
    if reward_model.startswith(("http://", "https://")):
        return HttpScorer(reward_model)
    from train.scorer import LocalScorer

    return LocalScorer(Path(reward_model))


def mean_reward(rewards: Sequence[float | None]) -> float | None:
    """Mean over the answers that could be graded; `None` when there are none."""
    known = [reward for reward in rewards if reward is not None]
    return sum(known) / len(known) if known else None
