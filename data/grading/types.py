"""What every grader takes and gives, and how its version is derived."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
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
    error: str | None = None
    """What made it abstain, as one of OpenAI's error flags of a grade; `None` where nothing failed."""


class Grader(Protocol):
    """Something that grades answers, with a name and a version."""

    name: str
    version: str

    def grade(self, item: Item, sample: RawSample) -> GradeResult:
        """The verdict on one answer. Never raises for what an answer contains."""
        ...


class AbstainError(Exception):
    """The grader cannot judge: what it compares with is missing, or what it asks fails. Becomes reward `None`."""

    def __init__(self, reason: str, error: str | None = None) -> None:
        super().__init__(reason)
        self.error = error
        """The flag of OpenAI's error object to raise, where something failed."""


class FailedAnswerError(Exception):
    """The answer lacks what is graded (it does not parse, a field is missing). Becomes reward 0."""


class GraderConfig(BaseModel):
    """Base of the configurations: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    name: str = Field("grader", min_length=1, max_length=128)
    max_answer_chars: int = Field(100_000, ge=1)
    """A longer answer fails unread; it bounds what a pattern or a comparison can cost."""


Config = TypeVar("Config", bound=GraderConfig)


Graded = tuple[float, dict[str, float], str]
"""Reward, score card and reason."""


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
        return self._guarded(lambda: self._grade(item, self._checked(sample)))

    def _guarded(self, judge: Callable[[], Graded]) -> GradeResult:
        try:
            reward, card, reason = judge()
        except AbstainError as signal:
            return GradeResult(None, {}, str(signal), self.version, signal.error)
        except FailedAnswerError as signal:
            return GradeResult(0.0, {}, str(signal), self.version)
        return GradeResult(min(max(reward, 0.0), 1.0), card, reason, self.version)

    def _checked(self, sample: RawSample) -> dict[str, Any]:
        """The answer, if it is a text of bearable length."""
        text = sample.get("output_text")
        if not isinstance(text, str):
            raise AbstainError("there is no answer to grade")
        if len(text) > self.config.max_answer_chars:
            raise FailedAnswerError(f"the answer has {len(text)} characters")
        return {**sample, "output_text": text}

    def _grade(self, item: Item, sample: dict[str, Any]) -> Graded:
        raise NotImplementedError


class AskingGrader(BaseGrader[Config]):
    """A grader that asks a model: it says what to ask, and what an answer to that is worth.

    It touches no network itself, so the same grader serves callers with and without an event loop.
    """

    def question(self, item: Item, sample: RawSample) -> "Question | GradeResult":
        """What to ask about an answer, or the verdict where nobody needs to be asked."""
        asked: list[Question] = []
        decided = self._guarded(lambda: self._put(asked, item, self._checked(sample)))
        return asked[0] if asked else decided

    def verdict(self, question: "Question", document: Any) -> GradeResult:
        """The verdict from the JSON document that came back."""
        return self._guarded(lambda: self._read(question, document))

    def unanswered(self, error: AbstainError) -> GradeResult:
        """The abstention when nothing usable came back."""
        return GradeResult(None, {}, str(error), self.version, error.error)

    def grade(self, item: Item, sample: RawSample) -> GradeResult:
        """The verdict on one answer, waiting for the model."""
        question = self.question(item, sample)
        if isinstance(question, GradeResult):
            return question
        try:
            document = self._ask(question)
        except AbstainError as error:
            return self.unanswered(error)
        return self.verdict(question, document)

    def _put(self, asked: "list[Question]", item: Item, sample: dict[str, Any]) -> Graded:
        asked.append(self._question(item, sample))
        return 0.0, {}, ""

    def _question(self, item: Item, sample: dict[str, Any]) -> "Question":
        raise NotImplementedError

    def _read(self, question: "Question", document: Any) -> Graded:
        raise NotImplementedError

    def _ask(self, question: "Question") -> Any:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Question:
    """A request to a model: what is posted, and where."""

    path: str
    """Below the endpoint's address, for example `/v1/chat/completions`."""
    body: dict[str, Any]


class Endpoint(Protocol):
    """An OpenAI-compatible server that can be asked."""

    @property
    def url(self) -> str:
        """Its address; part of the version of every grader that asks it."""
        ...

    def ask(self, question: Question) -> Any:
        """The JSON document that comes back.

        Raises:
            AbstainError: nothing usable comes back.
        """
        ...


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
