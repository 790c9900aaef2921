"""`reward_model`: the score of a trained reward model as a reward in [0, 1].

The model itself runs elsewhere, behind an engine or in the process that trains: whoever makes the grader
hands over a scorer. The digest in the configuration says which model is meant, so a grader's version names
its reward model, and a scorer that holds another one is refused.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field

from cluster.errors import InputError, UnavailableError
from data.grading.screen import screen
from data.grading.types import AbstainError, AskingGrader, FailedAnswerError, Graded, GraderConfig, Item, Question

Conversation = Sequence[Mapping[str, Any]]
SCORES = "/v1/scores"


class Scorer(Protocol):
    """A reward model that can be asked."""

    @property
    def adapter_sha256(self) -> str:
        """Digest of the reward model."""
        ...

    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        """The raw score of each conversation, which ends with the answer.

        Raises:
            UnavailableError: the model does not answer.
            DatasetError: a conversation cannot be rendered.
        """
        ...


class RewardModelConfig(GraderConfig):
    """Which reward model, and how its score becomes a reward."""

    type: Literal["reward_model"]
    adapter_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the reward model, as its training reported it."""
    center: float = 0.0
    """Score that means 0.5."""
    temperature: float = Field(1.0, gt=0)
    """Score differences are divided by it; training reports the one that fits."""
    screen: bool = True
    """Answers that hold nothing but an opening, or speak to their judge, fail unread."""


class RewardModel(AskingGrader[RewardModelConfig]):
    """Reward is sigmoid((score - center) / temperature); a model that cannot be reached abstains."""

    modules: ClassVar[tuple[str, ...]] = ("reward_model", "screen")

    def __init__(self, config: RewardModelConfig, scorer: Scorer) -> None:
        super().__init__(config)
        self.scorer = scorer

    def refitted(self, factor: float) -> "RewardModel":
        """The same reward model with its temperature multiplied: another version of the grader."""
        config = self.config.model_copy(update={"temperature": self.config.temperature * factor})
        return RewardModel(config, self.scorer)

    def _question(self, item: Item, sample: dict[str, Any]) -> Question:
        messages = item.get("messages")
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise AbstainError("the item has no 'messages'")
        if self.config.screen and (reason := screen(sample["output_text"])) is not None:
            raise FailedAnswerError(reason)
        conversation = [*messages, {"role": "assistant", "content": sample["output_text"]}]
        return Question(SCORES, {"conversations": [conversation]})

    def _ask(self, question: Question) -> Any:
        try:
            scores = self.scorer.scores(question.body["conversations"])
        except (UnavailableError, ValueError) as error:
            raise AbstainError(str(error), "model_grader_server_error") from None
        return {"adapter_sha256": self.scorer.adapter_sha256, "scores": scores}

    def _read(self, question: Question, document: Any) -> Graded:
        try:
            (score,) = (float(value) for value in document["scores"])
            answering = document["adapter_sha256"]
        except (KeyError, TypeError, ValueError):
            raise AbstainError("the reward model's reply holds no score", "model_grader_server_error") from None
        if answering != self.config.adapter_sha256:
            raise AbstainError("another reward model answers now", "model_grader_server_error")
        if not math.isfinite(score):
            raise AbstainError(f"the reward model's score is {score}")
        reward = _sigmoid((score - self.config.center) / self.config.temperature)
        return reward, {"score": reward}, f"score {score:.3f}"


def reward_model(config: RewardModelConfig, scorer: Scorer | None, field: str) -> RewardModel:
    """The grader, with a scorer that holds the model the configuration names.

    Raises:
        InputError: there is no scorer here, or it holds another model.
    """
    if scorer is None:
        raise InputError(
            f"{field}.type",
            "reward_model",
            "has no reward model to ask",
            "set `evaluation.reward_model`, or `grader.reward_model_url`",
        )
    if scorer.adapter_sha256 != config.adapter_sha256:
        raise InputError(
            f"{field}.adapter_sha256",
            config.adapter_sha256,
            f"is not the reward model that answers ({scorer.adapter_sha256[:12]}…)",
            "name that one or start the other",
        )
    return RewardModel(config, scorer)


class HttpScorer:
    """A reward model behind HTTP: `rayloop train reward-server`."""

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s

    @cached_property
    def adapter_sha256(self) -> str:
        """Which model answers; asked once.

        Raises:
            UnavailableError: nobody does.
        """
        return str(self._call(None)["adapter_sha256"])

    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw scores, in order."""
        reply = self._call({"conversations": [list(c) for c in conversations]})
        if reply["adapter_sha256"] != self.adapter_sha256:
            raise UnavailableError(f"another reward model answers at {self.url} now")
        return [float(score) for score in reply["scores"]]

    def _call(self, body: Any) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}{SCORES}",
            data,
            {"Content-Type": "application/json"},
            method="GET" if body is None else "POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                document: dict[str, Any] = json.load(reply)
                return document
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise UnavailableError(f"the reward model at {self.url} does not answer ({error})") from None


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
