"""What a version would have earned on logged traffic, by inverse propensities and doubly robust; reported only.

The held-out answers were drawn by versions that recorded how likely each was. Their rewards are weighed by how much
more likely the other version finds the very same answers. Over whole answers such weights spread widely, so the
effective sample size says first whether there is an estimate at all: two versions that answer differently have none.

The expected reward in the doubly robust estimate is the mean of the other half's users, the same for every answer:
right weights make it unbiased, and the mean takes away what is common to all rewards.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.offpolicy import Value, cross_fitted_mean, doubly_robust, weighted_mean
from data.template import content_text
from train.evaluate.evidence import Answers, Evidence
from train.evaluate.types import Gate, Logged, Prompt

LARGEST = 50.0  # nats; a heavier weight is the only one that counts, whatever its size


def read_logged(dataset: Path, *, split: str = "test", limit: int) -> list[Logged]:
    """Rewarded answers of which is known how likely they were, at most `limit`, the same ones each time.

    Raises:
        DatasetError: the dataset cannot be read.
    """
    from data.manifest import read_examples

    rows = [row for row in read_examples(dataset, "reward", split).to_pylist() if row["logprob"] is not None]
    rows.sort(key=lambda row: hashlib.sha256(str(row["example_id"]).encode()).digest())
    return [
        Logged(
            example_id=row["example_id"],
            user_id=row["user_id"],
            prompt=Prompt(tuple(json.loads(row["prompt"])), tuple(json.loads(row["tools"])) if row["tools"] else None),
            answer=content_text(json.loads(row["response"])[0]),
            reward=row["reward"],
            logprob=row["logprob"],
            tokens=row["answer_tokens"],
        )
        for row in rows[:limit]
    ]


def off_policy(evidence: Evidence) -> Gate:
    """Estimated mean reward of both versions on logged traffic; no evidence where the effective sample is small."""
    needed = evidence.settings.min_effective_samples
    metrics: dict[str, float] = {}
    found = {role: _estimates(evidence, answers) for role, answers in evidence.both()}
    for role, estimates in found.items():
        metrics |= {f"{role}_effective_samples": estimates[0].effective_requests if estimates else 0.0}
        if estimates and estimates[0].effective_requests >= needed:
            metrics |= {f"{role}_{estimate.estimator}": estimate.value for estimate in estimates}
    mine = found["candidate"]
    if not mine:
        detail = f"none of {len(evidence.logged)} rewarded held-out answers has a log-probability that can be used"
        return Gate("off_policy", "no_data", detail=detail, metrics=metrics)
    effective, rows = mine[0].effective_requests, len(_usable(evidence.logged, evidence.candidate))
    sizes = f"effective sample size {effective:.0f} of {rows} answers"
    if effective < needed:
        detail = f"no evidence: {sizes}, {needed:g} are needed"
        return Gate("off_policy", "no_data", detail=detail, metrics=metrics)
    plain, robust = mine
    return Gate(
        "off_policy",
        "passed",
        value=robust.value,
        interval=(robust.low, robust.high),
        detail=f"doubly robust {robust.value:.3f}, IPS {plain.value:.3f}; {sizes}",
        metrics=metrics,
    )


def _estimates(evidence: Evidence, answers: Answers) -> tuple[Value, Value] | None:
    """IPS and doubly robust, or `None` without a usable row."""
    usable = _usable(evidence.logged, answers)
    if not usable:
        return None
    logged = [evidence.logged[place] for place in usable]
    nats_N = np.array([answers.logged[place][0] for place in usable])
    weight_N = np.exp(np.minimum(nats_N - np.array([row.logprob for row in logged]), LARGEST))
    reward_N = np.array([row.reward for row in logged])
    _, user_N = np.unique([row.user_id for row in logged], return_inverse=True)
    expected_N = cross_fitted_mean(user_N, reward_N, np.ones(len(logged), dtype=bool))
    alpha = 1 - evidence.settings.confidence
    return (
        weighted_mean(user_N, weight_N, reward_N, alpha),
        doubly_robust(user_N, weight_N, reward_N, (expected_N, expected_N), alpha),
    )


def _usable(logged: Sequence[Logged], answers: Answers) -> list[int]:
    """Places of the answers that the version reads as the same number of tokens as were drawn."""
    return [n for n, (row, (_, tokens)) in enumerate(zip(logged, answers.logged, strict=True)) if row.tokens == tokens]
