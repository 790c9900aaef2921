"""`pair_model`: a language model says whether an answer is better than another one, asked in both orders.

Judges lean towards a place (Zheng et al. 2023, "Judging LLM-as-a-Judge", arXiv:2306.05685), so the same pair is put
before the judge twice with the places exchanged, and only a preference that survives counts; else it is a tie.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from cluster.errors import InputError
from data.grading.judge import Judge, JudgeConfig, fenced, fill, json_object, verdict_object
from data.grading.screen import screen
from data.grading.text import TEMPLATE, check_template, render
from data.grading.types import (
    AbstainError,
    BaseGrader,
    Endpoint,
    FailedAnswerError,
    Graded,
    GradeResult,
    Item,
    Question,
)

WON, TIED, LOST = 1.0, 0.5, 0.0
BETTER = {"first": WON, "second": LOST, "tie": TIED}
"""What a verdict is worth to the answer that was shown first."""
AHEAD, BEHIND = "shown first", "shown second"


class PairModelConfig(JudgeConfig):
    """`input` says what was asked; the two answers follow it by themselves."""

    type: Literal["pair_model"]
    opponent: str = "{{ item.opponent }}"
    """Template of the other answer, over `item`."""

    @field_validator("opponent")
    @classmethod
    def _names_the_item(cls, value: str) -> str:
        check_template("opponent", value)
        if any(name.startswith("sample") for name in TEMPLATE.findall(value)):
            raise InputError("opponent", value, "names the answer itself", "use {{ item.opponent }}")
        return value


class OneOrder(Judge[PairModelConfig]):
    """The judge's verdict on one order of the two answers; the reward is the sample's: 1, 0.5 or 0."""

    modules: ClassVar[tuple[str, ...]] = ("judge", "screen", "pair_model")

    def __init__(self, config: PairModelConfig, endpoint: Endpoint, *, shown_first: bool) -> None:
        self.shown_first = shown_first
        super().__init__(config, endpoint)
        self.version = f"{self.version}-{'ab' if shown_first else 'ba'}"  # what was said of one order holds for it only

    def _put(self, asked: list[Question], item: Item, sample: dict[str, Any]) -> Graded:
        """An attack loses unread to an answer that is none."""
        opponent = render(self.config.opponent, item, sample)
        if len(opponent) > self.config.max_answer_chars:
            raise AbstainError(f"the other answer has {len(opponent)} characters")
        if self.config.screen:
            reason, other_reason = screen(sample["output_text"]), screen(opponent)
            if reason is not None and other_reason is not None:
                raise AbstainError(f"neither can be compared: {reason}")
            if reason is not None:
                raise FailedAnswerError(reason)
            if other_reason is not None:
                return WON, {}, f"of the other: {other_reason}"
        asked.append(self._pair(item, sample, opponent))
        return TIED, {}, ""

    def _pair(self, item: Item, sample: dict[str, Any], opponent: str) -> Question:
        answers = [sample["output_text"], opponent]
        mark = self._mark(*answers)
        shown = answers if self.shown_first else answers[::-1]
        both = "\n".join(
            f"The {place} answer: {fenced(f'answer-{mark}', text)}"
            for place, text in zip(("first", "second"), shown, strict=True)
        )
        prompt = [(m.chat_role, fill(m.text, item, sample, mark)) for m in self.config.input]
        return self._asked(self.config, [*prompt, ("user", f"{both}\nWhich answer is better?")], mark)

    def _form(self) -> str:
        return '{"better": "first", "second" or "tie"}'

    def _schema(self) -> dict[str, Any]:
        return json_object("better", {"type": "string", "enum": list(BETTER)})

    def _read(self, question: Question, document: Any) -> Graded:
        said = verdict_object(document).get("better")
        if not isinstance(said, str) or said not in BETTER:
            raise AbstainError(
                f"the judge's verdict {said!r:.60} is none of {', '.join(BETTER)}", "model_grader_parse_error"
            )
        ahead = BETTER[said]
        return ahead if self.shown_first else WON - ahead, {}, f"better: {said}"


class PairModel(BaseGrader[PairModelConfig]):
    """Reward is 1 where the answer is better than its opponent, 0 where it is worse, 0.5 where neither is."""

    modules: ClassVar[tuple[str, ...]] = ("pair_model",)

    def __init__(self, config: PairModelConfig, endpoint: Endpoint) -> None:
        self.graders = {
            AHEAD: OneOrder(config, endpoint, shown_first=True),
            BEHIND: OneOrder(config, endpoint, shown_first=False),
        }
        self.libraries = tuple(grader.version for grader in self.graders.values())
        super().__init__(config)

    def _grade(self, item: Item, sample: dict[str, Any]) -> Graded:
        return _settled({name: grader.grade(item, sample) for name, grader in self.graders.items()})

    def combine(self, results: Mapping[str, GradeResult]) -> GradeResult:
        """The verdict from those on both orders."""
        return self._guarded(lambda: _settled(results))


def _settled(results: Mapping[str, GradeResult]) -> Graded:
    for name, result in results.items():
        if result.reward is None:
            raise AbstainError(f"{name}: {result.reason}", result.error)
    ahead, behind = results[AHEAD], results[BEHIND]
    assert ahead.reward is not None and behind.reward is not None
    if ahead.reward == behind.reward:
        return ahead.reward, {}, ahead.reason
    return TIED, {}, "the orders disagree"


def compared(reward: float | None, other: float | None) -> float | None:
    """What two rewards of a grader that sees one answer at a time say: 1, 0.5 or 0; `None` where either is missing."""
    if reward is None or other is None:
        return None
    return WON if reward > other else LOST if reward < other else TIED
