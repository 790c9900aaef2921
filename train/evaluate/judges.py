"""Which of two answers is better: by a grader's rewards, or by a judge that sees both."""

from dataclasses import dataclass
from typing import Any, Protocol

from data.grading import Grader
from train.evaluate.types import Truth

Outcome = int
"""1: the first is better, 0: a tie, -1: the second is better."""


class PairwiseJudge(Protocol):
    """Sees two answers in an order and says which is better."""

    def prefer(self, truth: Truth, first: str, second: str) -> Outcome | None:
        """1, 0 or -1; `None` abstains."""
        ...


@dataclass(frozen=True)
class ByReward:
    """Compares the rewards of a grader that sees one answer at a time; order cannot matter."""

    grader: Grader

    def prefer(self, truth: Truth, first: str, second: str) -> Outcome | None:
        """The answer with the higher reward; an abstention on either is one on the pair."""
        left, right = self.reward(truth, first), self.reward(truth, second)
        if left is None or right is None:
            return None
        return (left > right) - (left < right)

    def reward(self, truth: Truth, answer: str) -> float | None:
        """The grader's reward of one answer."""
        return self.grader.grade(_item(truth), {"output_text": answer}).reward


@dataclass(frozen=True)
class SideBySide:
    """A grader that sees both answers: the first as the answer it grades, the second as `item.other`.

    A reward above one half means that the first is better.
    """

    grader: Grader

    def prefer(self, truth: Truth, first: str, second: str) -> Outcome | None:
        """What the grader says of the first beside the second."""
        reward = self.grader.grade({**_item(truth), "other": second}, {"output_text": first}).reward
        return None if reward is None else (reward > 0.5) - (reward < 0.5)


def _item(truth: Truth) -> dict[str, Any]:
    return {"reference": truth.reference, "messages": list(truth.prompt.messages), "example_id": truth.example_id}


@dataclass(frozen=True)
class BothOrders:
    """Asks a judge twice with the answers swapped; only a preference that survives counts."""

    judge: PairwiseJudge

    def prefer(self, truth: Truth, first: str, second: str) -> Outcome | None:
        """The preference both orders agree on; a tie where they do not."""
        ahead = self.judge.prefer(truth, first, second)
        swapped = self.judge.prefer(truth, second, first)
        if ahead is None or swapped is None:
            return None
        return ahead if ahead == -swapped else 0
