"""`rubric`: partial credit per criterion, by deterministic checks written in YAML.

```yaml
type: rubric
name: triage
criteria:
  verdict:
    kind: verdict
    weight: 3
    checks:
      - {check: json_equals, path: verdict, value: "{{ item.reference.verdict }}"}
  format:
    kind: format
    checks:
      - {check: valid_json, required: [verdict, owner], only: true}
```

An answer earns nothing by being empty or polite. Criteria of kind verdict, evidence and tool_use are the
substance; format and safety say how it was given, and count only once some substance was earned. A
`required` criterion that is not met in full makes the reward 0; safety is required unless it says otherwise.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data.grading.checks import Answer, AnyCheck, check_templates
from data.grading.types import BaseGrader, FailedAnswerError, GraderConfig, Item

SUBSTANCE = ("verdict", "evidence", "tool_use")


class Criterion(BaseModel):
    """One thing that is judged, by the weighted share of its checks that pass."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["verdict", "evidence", "tool_use", "format", "safety"]
    weight: float = Field(1.0, gt=0)
    required: bool = False
    """Not met in full: the whole answer fails. Always so for safety unless `optional` is set."""
    optional: bool = False
    description: str = ""
    checks: list[AnyCheck] = Field(min_length=1, max_length=64)

    @property
    def must_hold(self) -> bool:
        """Whether a shortfall fails the whole answer."""
        return self.required or (self.kind == "safety" and not self.optional)

    def score(self, answer: Answer) -> float:
        """Weighted share of the checks that pass; a value the answer lacks is a check that fails."""
        passed = sum(check.weight for check in self.checks if _passes(check, answer))
        return passed / sum(check.weight for check in self.checks)


class RubricConfig(GraderConfig):
    """The criteria, by name."""

    type: Literal["rubric"]
    description: str = ""
    criteria: dict[str, Criterion] = Field(min_length=1, max_length=64)

    @field_validator("criteria", mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            check_templates(value)
        return value

    @model_validator(mode="after")
    def _has_substance(self) -> "RubricConfig":
        if not any(criterion.kind in SUBSTANCE for criterion in self.criteria.values()):
            raise ValueError(f"needs a criterion of kind {', '.join(SUBSTANCE)}: manners alone earn nothing")
        return self


class Rubric(BaseGrader[RubricConfig]):
    """Reward is the weighted mean of the criteria, under the rules above."""

    modules: ClassVar[tuple[str, ...]] = ("rubric", "checks")

    def _grade(self, item: Item, sample: dict[str, Any]) -> tuple[float, dict[str, float], str]:
        answer, criteria = Answer(item, sample), self.config.criteria
        card = {name: criterion.score(answer) for name, criterion in criteria.items()}
        failed = [name for name, criterion in criteria.items() if criterion.must_hold and card[name] < 1]
        if failed:
            return 0.0, card, f"{failed[0]} is required and was not met"
        if not any(card[name] for name, criterion in criteria.items() if criterion.kind in SUBSTANCE):
            return 0.0, card, "nothing of substance was right"
        total = sum(criterion.weight for criterion in criteria.values())
        reward = sum(criteria[name].weight * score for name, score in card.items()) / total
        short = [name for name, score in card.items() if score < 1]
        return reward, card, f"short in {', '.join(short)}" if short else "all criteria met"


def _passes(check: AnyCheck, answer: Answer) -> bool:
    try:
        return check.passes(answer)
    except FailedAnswerError:
        return False
