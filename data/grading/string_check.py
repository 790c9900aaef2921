"""`string_check`: compare two strings, as in OpenAI's grader schema."""

from typing import Any, ClassVar, Literal

from pydantic import field_validator

from data.grading.text import check_template, render
from data.grading.types import AbstainError, BaseGrader, GraderConfig, Item


class StringCheckConfig(GraderConfig):
    """`input` and `reference` are templates."""

    type: Literal["string_check"]
    input: str = "{{ sample.output_text }}"
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"] = "eq"
    """`like`: the input contains the reference; `ilike`: whatever the case."""

    @field_validator("input", "reference")
    @classmethod
    def _known_names(cls, value: str) -> str:
        check_template("template", value)
        return value


class StringCheck(BaseGrader[StringCheckConfig]):
    """Reward 1 or 0."""

    modules: ClassVar[tuple[str, ...]] = ("string_check",)

    def _grade(self, item: Item, sample: dict[str, Any]) -> tuple[float, dict[str, float], str]:
        config = self.config
        text, reference = render(config.input, item, sample), render(config.reference, item, sample)
        if not reference.strip() and config.operation in ("like", "ilike"):
            raise AbstainError("the reference is empty, and every answer contains it")
        passed = {
            "eq": text == reference,
            "ne": text != reference,
            "like": reference in text,
            "ilike": reference.casefold() in text.casefold(),
        }[config.operation]
        return float(passed), {}, f"{config.operation} {'holds' if passed else 'does not hold'}"
