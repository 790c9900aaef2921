"""Hand-made versions and truths for the tests of evaluation."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.evaluate.types import Logged, Prompt, Truth

Answerer = Callable[[str], str]
CASE_SUITES = ("refusal", "over_refusal", "regression", "tool_calls", "grounding", "sycophancy", "anchor")
"""Suites with built-in cases, which a toy was never taught."""


@dataclass
class FakeModel:
    """Answers by a function of the last message; its loss is the same for every token."""

    name: str
    answerer: Answerer
    nats_per_token: float = 0.5

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self.answerer(str(prompt.messages[-1]["content"])) for prompt in prompts]

    def losses(self, truths: Sequence[Truth]) -> list[tuple[float, int]]:
        return [(self.nats_per_token * 10, 10) for _ in truths]

    def likelihoods(self, logged: Sequence[Logged]) -> list[tuple[float, int]]:
        return [(-self.nats_per_token * row.tokens, row.tokens) for row in logged]


def prompt(text: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},))


def make_truths(number: int, verdict: Answerer = lambda text: "benign") -> list[Truth]:
    """Alerts of three prompts a user, with the recorded verdict."""
    return [
        Truth(
            example_id=f"e{i:03d}",
            user_id=f"u{i // 3}",
            prompt=prompt(f"alert {i}"),
            reference=json.dumps({"verdict": verdict(f"alert {i}"), "owner": "soc"}),
            origin="correction" if i % 5 == 0 else "liked",
        )
        for i in range(number)
    ]


def answer_json(verdict: str, owner: str = "soc") -> str:
    return json.dumps({"verdict": verdict, "owner": owner})
