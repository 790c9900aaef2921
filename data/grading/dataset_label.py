"""`dataset_label`: compare an answer with recorded truth: a correction, or an answer a person liked.

A JSON object is compared field by field (partial credit), text after normalisation. Where nothing was
recorded the grader abstains.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from data.grading.text import MISSING, check_template, equal, normalise, parse_json, render_value
from data.grading.text_similarity import similarity
from data.grading.types import AbstainError, BaseGrader, FailedAnswerError, GraderConfig, Item


class DatasetLabelConfig(GraderConfig):
    """How an answer is compared with what was recorded."""

    type: Literal["dataset_label"]
    reference: str = "{{ item.reference }}"
    """Template of the recorded answer."""
    fields: dict[str, float] | None = None
    """Weight of each JSON field; `None`: every field of the reference or the answer, equally."""
    text: Literal["exact", "rouge_l", "fuzzy_match"] = "exact"
    """How answers that are not JSON objects are compared."""
    extract: str | None = Field(None, max_length=1_000)
    """Pattern whose last match (its first group, if it has one) is compared instead of the whole text."""

    @field_validator("reference")
    @classmethod
    def _known_names(cls, value: str) -> str:
        check_template("reference", value)
        return value

    @field_validator("fields")
    @classmethod
    def _positive(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (not value or min(value.values()) <= 0):
            raise ValueError("must name at least one field, each with a weight above 0")
        return value

    @field_validator("extract")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is not a pattern: {error}") from None
        return value


class DatasetLabel(BaseGrader[DatasetLabelConfig]):
    """Reward is the weighted share of fields that agree, or the agreement of the texts."""

    modules: ClassVar[tuple[str, ...]] = ("dataset_label", "text_similarity")

    def _grade(self, item: Item, sample: dict[str, Any]) -> tuple[float, dict[str, float], str]:
        recorded = render_value(self.config.reference, item, sample)
        if isinstance(recorded, str):
            if not recorded.strip():
                raise AbstainError("the recorded answer is empty")
            parsed = parse_json(recorded)
            recorded = parsed if isinstance(parsed, Mapping) else recorded
        if isinstance(recorded, Mapping):
            return self._grade_fields(recorded, sample["output_text"])
        return self._grade_text(str(recorded), sample["output_text"])

    def _grade_fields(self, recorded: Mapping[str, Any], text: str) -> tuple[float, dict[str, float], str]:
        answer = parse_json(text)
        if not isinstance(answer, Mapping):
            raise FailedAnswerError("the answer is not a JSON object")
        weights = self.config.fields or dict.fromkeys([*recorded, *answer], 1.0)
        if missing := [name for name in self.config.fields or () if name not in recorded]:
            raise AbstainError(f"the recorded answer has no {missing[0]!r}")
        card = {name: float(equal(recorded.get(name, MISSING), answer.get(name, MISSING))) for name in weights}
        reward = sum(weights[name] * score for name, score in card.items()) / sum(weights.values())
        wrong = [name for name, score in card.items() if not score]
        return reward, card, f"differs in {', '.join(wrong)}" if wrong else "all fields agree"

    def _grade_text(self, recorded: str, text: str) -> tuple[float, dict[str, float], str]:
        expected, found = recorded, text
        if self.config.extract:
            expected, found = self._extract(recorded), self._extract(text)
            if not expected:
                raise AbstainError("the pattern finds nothing in the recorded answer")
        if self.config.text == "exact":
            score = float(bool(normalise(expected)) and normalise(expected) == normalise(found))
        else:
            score = similarity(self.config.text, found, expected)
        return score, {"text": score}, f"{self.config.text} {score:.3f}"

    def _extract(self, text: str) -> str:
        matches = list(re.finditer(self.config.extract or "", text))
        return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or "" if matches else ""
