"""What every grader takes and gives, and how its version is derived."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).parent
Item = Mapping[str, Any]
"""What is known about the prompt: reference answers, metadata; `{{ item.x }}` in templates."""
RawSample = Mapping[str, Any]
"""The answer as callers hand it in: `output_text`, and `output_tools` where tools were called."""


@dataclass(frozen=True, slots=True)
class GradeResult:
    """The verdict on one answer."""

    reward: float | None
    """In [0, 1]; `None`: the grader abstains, which is masked and counted, never taken as 0."""
    score_card: dict[str, float] = field(default_factory=dict)
    """Score of each criterion, field or sub-grader, in [0, 1]."""
    reason: str = ""
    grader_version: str = ""


class Grader(Protocol):
    """Something that grades answers, with a name and a version."""

    name: str
    version: str

    def grade(self, item: Item, sample: RawSample) -> GradeResult:
        """The verdict on one answer. Never raises for what an answer contains."""
        ...


class AbstainError(Exception):
    """The grader cannot judge: what it compares with is missing. Becomes reward `None`."""


class FailedAnswerError(Exception):
    """The answer lacks what is graded (it does not parse, a field is missing). Becomes reward 0."""


class GraderConfig(BaseModel):
    """Base of the configurations: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    name: str = Field("grader", min_length=1, max_length=128)
    max_answer_chars: int = Field(100_000, ge=1)
    """A longer answer fails unread; it bounds what a pattern or a comparison can cost."""


Config = TypeVar("Config", bound=GraderConfig)


class BaseGrader(Generic[Config]):
    """Turns `_grade` into `grade`: bounds the answer, maps the two signals, stamps the version."""

    modules: ClassVar[tuple[str, ...]] = ()
    """Files of this folder the reward depends on."""
    libraries: tuple[str, ...] = ()
    """Versions of what else the reward depends on: libraries, other graders."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = config.name
        self.version = version_of(config, self.modules, self.libraries)

    def grade(self, item: Item, sample: RawSample) -> GradeResult:
        """The verdict on one answer; abstains or fails as the grader's rule says, never raises."""
        text = sample.get("output_text")
        if not isinstance(text, str):
            return GradeResult(None, {}, "there is no answer to grade", self.version)
        if len(text) > self.config.max_answer_chars:
            return GradeResult(0.0, {}, f"the answer has {len(text)} characters", self.version)
        try:
            reward, card, reason = self._grade(item, {**sample, "output_text": text})
        except AbstainError as signal:
            return GradeResult(None, {}, str(signal), self.version)
        except FailedAnswerError as signal:
            return GradeResult(0.0, {}, str(signal), self.version)
        return GradeResult(min(max(reward, 0.0), 1.0), card, reason, self.version)

    def _grade(self, item: Item, sample: dict[str, Any]) -> tuple[float, dict[str, float], str]:
        raise NotImplementedError


def version_of(config: GraderConfig, modules: Iterable[str], libraries: Iterable[str] = ()) -> str:
    """`<type>-<12 hex>`: a digest of configuration and code, so no edit can be forgotten.

    `modules` are the files of this folder the reward depends on, `libraries` versions of others' code.
    """
    digest = hashlib.sha256(orjson.dumps(config.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS))
    for module in sorted({"types", "text", *modules}):
        digest.update(hashlib.sha256((FOLDER / f"{module}.py").read_bytes()).digest())
    for library in libraries:
        digest.update(hashlib.sha256(library.encode()).digest())
    return f"{config.model_dump()['type']}-{digest.hexdigest()[:12]}"
