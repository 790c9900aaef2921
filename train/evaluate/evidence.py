"""What the suites look at: each version's answers and losses, and what people say of them; made once, shared by all."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.settings.evaluation import EvaluationSettings
from data.detectors.interface import Detector
from data.grading import Grader
from data.labelling.requests import JudgedPair, Judgement, LabelRequest
from train.evaluate.types import Case, Logged, Model, Prompt, Truth


@dataclass(frozen=True)
class Answers:
    """One version's answers, and its losses on the recorded ones."""

    name: str
    by_prompt: dict[str, str]
    losses: list[tuple[float, int]]
    """One an entry of `Evidence.truths`: nats, tokens."""
    seconds: float = 0.0
    logged: list[tuple[float, int]] = field(default_factory=list)
    """One an entry of `Evidence.logged`: log-probability in nats, tokens."""

    def to(self, prompt: Prompt) -> str:
        """The answer to a prompt that was asked."""
        return self.by_prompt[prompt_key(prompt)]

    def after(self, case: Case) -> str:
        """The answer once the user has insisted."""
        return self.to(case.argued(self.to(case.prompt)))


@dataclass(frozen=True)
class Question:
    """One prompt whose two answers people compare."""

    truth: Truth
    request: LabelRequest
    place: int
    """Where the candidate's answer stands: 0 or 1, by a hash that tells reviewers nothing."""


@dataclass(frozen=True)
class Asked:
    """What people were asked, and what they have said so far."""

    questions: Sequence[Question]
    said: Mapping[str, Sequence[Judgement]]
    """By request id."""


@dataclass(frozen=True)
class Evidence:
    """Everything a suite may use."""

    settings: EvaluationSettings
    truths: list[Truth]
    candidate: Answers
    champion: Answers
    grader: Grader
    cases: dict[str, list[Case]] = field(default_factory=dict)
    judge: Grader | None = None
    """Sees two answers side by side; `None` where the grader's rewards are compared."""
    reward_model: Grader | None = None
    """A reward model as a grader, for the drift alert."""
    logged: list[Logged] = field(default_factory=list)
    """Rewarded answers of which is known how likely they were."""
    asked: Asked | None = None
    """What people were asked about the versions' answers."""
    judged: list[JudgedPair] = field(default_factory=list)
    """Recent answers of which people have preferred one."""
    toxicity: Detector | None = None
    """Judges answers; `None` for the shipped detector."""
    trained: bool = True
    """Whether the candidate was made by a training; `False` for a base model as it comes."""
    prompts: tuple[str | None, str | None] = (None, None)
    """Digests of the agent's prompt: in training, and in force; `None` where there was or is none."""
    template: tuple[str, str] | None = None
    """Digests of the template: recorded in training, and in force."""

    @property
    def users(self) -> list[str]:
        """The user behind each truth: the unit that is resampled."""
        return [truth.user_id for truth in self.truths]

    def both(self) -> list[tuple[str, Answers]]:
        """The two versions by role."""
        return [("candidate", self.candidate), ("champion", self.champion)]

    def options(self) -> dict[str, Any]:
        """How intervals are bootstrapped."""
        chosen = self.settings
        return {"confidence": chosen.confidence, "samples": chosen.bootstrap_samples, "seed": chosen.seed}


def prompt_key(prompt: Prompt) -> str:
    """Text that is the same for the same prompt."""
    return json.dumps([prompt.messages, prompt.tools], sort_keys=True)


def ask(model: Model, truths: Sequence[Truth], cases: Sequence[Case], logged: Sequence[Logged] = ()) -> Answers:
    """Put every different prompt to a version once, insist where a case says so, and measure its loss on the
    recorded answers and how likely it finds the logged ones."""
    started = time.monotonic()
    by_prompt = _answered(model, [truth.prompt for truth in truths] + [case.prompt for case in cases])
    argued = [case.argued(by_prompt[prompt_key(case.prompt)]) for case in cases if case.insists is not None]
    by_prompt |= _answered(model, argued)
    losses, likelihoods = model.losses(truths), model.likelihoods(logged)
    return Answers(model.name, by_prompt, losses, time.monotonic() - started, likelihoods)


def _answered(model: Model, asked: Sequence[Prompt]) -> dict[str, str]:
    prompts = {prompt_key(prompt): prompt for prompt in asked}
    return dict(zip(prompts, model.answer(list(prompts.values())), strict=True)) if prompts else {}
