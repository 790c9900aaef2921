"""Off-policy estimates against a policy whose value is known."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.toys import write_dataset
from tests.train.evaluate.fakes import FakeModel, prompt
from train.evaluate.evidence import Evidence, ask
from train.evaluate.off_policy import off_policy, read_logged
from train.evaluate.types import Logged

TOKENS = 3


def logged_at_random(count: int, right: float = 0.5, seed: int = 0) -> list[Logged]:
    """Answers of a policy that is right with this probability; a right answer earns 1."""
    random, rows = Random(seed), []
    for number in range(count):
        is_right = random.random() < right
        chance = right if is_right else 1 - right
        rows.append(
            Logged(
                example_id=f"e{number}",
                user_id=f"u{number}",
                prompt=prompt(f"alert {number}"),
                answer="right" if is_right else "wrong",
                reward=float(is_right),
                logprob=math.log(chance),
                tokens=TOKENS,
            )
        )
    return rows


@dataclass
class Knows(FakeModel):
    """Is right with a probability of its own."""

    right: float = 0.5

    def likelihoods(self, logged: Sequence[Logged]) -> list[tuple[float, int]]:
        return [(math.log(self.right if row.answer == "right" else 1 - self.right), TOKENS) for row in logged]


def evidence_of(make: Callable[..., Evidence], logged: list[Logged], right: float = 0.9) -> Evidence:
    candidate = Knows("t/2", lambda text: "right", right=right)
    champion = Knows("t/1", lambda text: "wrong", right=0.5)
    made = make(candidate, champion)
    return replace(
        made, logged=logged, candidate=ask(candidate, [], [], logged), champion=ask(champion, [], [], logged)
    )


def test_estimates_find_the_value_of_the_other_policy(make_evidence: Callable[..., Evidence]) -> None:
    """The candidate's value is .9 by construction; the log's own policy earns .5."""
    gate = off_policy(evidence_of(make_evidence, logged_at_random(3000)))
    assert gate.status == "passed" and gate.interval is not None and gate.interval[0] < 0.9 < gate.interval[1]
    assert gate.value == pytest.approx(0.9, abs=0.05)
    assert gate.metrics["candidate_ips"] == pytest.approx(0.9, abs=0.05)
    assert gate.metrics["champion_doubly_robust"] == pytest.approx(0.5, abs=0.05)
    # weights are 1.8 and 0.2: Kish gives n (mean w)^2 / mean w^2 = n / ((3.24 + .04) / 2)
    assert gate.metrics["candidate_effective_samples"] == pytest.approx(3000 / 1.64, rel=0.05)
    assert gate.metrics["champion_effective_samples"] == pytest.approx(3000)


def test_two_answers_by_hand(make_evidence: Callable[..., Evidence]) -> None:
    """IPS: (1.8 * 1 + 0.2 * 0) / 2. Doubly robust: each user expects the other's reward, 0 and 1."""
    logged = [replace(row, answer=a, reward=r) for row, a, r in zip(logged_at_random(2), AB, (1.0, 0.0), strict=True)]
    made = evidence_of(make_evidence, [replace(row, logprob=math.log(0.5)) for row in logged])
    gate = off_policy(replace(made, settings=made.settings.model_copy(update={"min_effective_samples": 1.0})))
    assert gate.metrics["candidate_ips"] == pytest.approx(0.9)
    assert gate.value == pytest.approx(((0 + 1.8 * (1 - 0)) + (1 + 0.2 * (0 - 1))) / 2)
    assert gate.metrics["candidate_effective_samples"] == pytest.approx(2.0**2 / (1.8**2 + 0.2**2))


AB = ("right", "wrong")


def test_a_small_effective_sample_is_no_evidence(make_evidence: Callable[..., Evidence]) -> None:
    gate = off_policy(evidence_of(make_evidence, logged_at_random(120)))
    assert gate.status == "no_data" and gate.value is None and "no evidence: effective sample size" in gate.detail
    assert "candidate_ips" not in gate.metrics and gate.metrics["candidate_effective_samples"] < 100


def test_an_answer_that_reads_as_other_tokens_does_not_count(make_evidence: Callable[..., Evidence]) -> None:
    rows = logged_at_random(400)
    made = evidence_of(make_evidence, [replace(row, tokens=TOKENS + (number % 2)) for number, row in enumerate(rows)])
    gate = off_policy(made)
    assert "of 200 answers" in gate.detail
    nothing = off_policy(evidence_of(make_evidence, [replace(row, tokens=9) for row in rows]))
    assert nothing.status == "no_data" and "none of 400" in nothing.detail


def test_held_out_rows_with_a_logprob_are_read(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "user_id": "ada", "interaction_ids": ["i"], "cluster_id": "c", "agent": "triage", "order": 0.0,
        "origin": "explicit", "synthetic": False, "weight": 1.0, "reward": 0.5, "answer_tokens": 4,
        "prompt": json.dumps([{"role": "user", "content": "What?"}]),
        "response": json.dumps([{"role": "assistant", "content": "This."}]),
    }  # fmt: skip
    made = [{**common, "example_id": f"e{n}", "logprob": None if n % 2 else -2.0} for n in range(8)]
    folder = write_dataset(tmp_path / "logged", {"reward": made}, validation_share=0.5)
    found = read_logged(folder, split="validation", limit=10)
    assert sorted(row.example_id for row in found) == ["e4", "e6"]
    assert (found[0].answer, found[0].logprob, found[0].tokens, found[0].reward) == ("This.", -2.0, 4, 0.5)
    assert len(read_logged(folder, split="validation", limit=1)) == 1 and read_logged(folder, limit=10) == []
