"""The deterministic checks a rubric is made of: each is a small model with `passes(answer)`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data.grading.text import (
    MISSING,
    check_template,
    equal,
    lookup,
    normalise,
    parse_json,
    render_value,
)
from data.grading.types import Item


@dataclass(frozen=True)
class Answer:
    """An answer with what the checks look at, and the item its templates are filled from."""

    item: Item
    sample: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The answer's text."""
        return str(self.sample["output_text"])

    @property
    def json(self) -> Any:
        """The answer's JSON value, or `MISSING`."""
        return parse_json(self.text)

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """Tool calls as `{"name", "arguments"}`, in order."""
        return [_call(call) for call in self.sample.get("output_tools") or [] if isinstance(call, Mapping)]

    def value(self, configured: Any) -> Any:
        """A configured value with its template filled in."""
        return render_value(configured, self.item, self.sample)

    def field(self, path: str) -> Any:
        """The value at a dotted path of the answer's JSON, or `MISSING`."""
        return lookup(self.json, path) if self.json is not MISSING else MISSING


class Check(BaseModel):
    """Base of the checks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    weight: float = Field(1.0, gt=0)

    def passes(self, answer: Answer) -> bool:
        """Whether the answer passes."""
        raise NotImplementedError


class JsonEquals(Check):
    """A field of the answer's JSON equals a value."""

    check: Literal["json_equals"]
    path: str
    value: Any

    def passes(self, answer: Answer) -> bool:
        return equal(answer.field(self.path), answer.value(self.value))


class JsonIn(Check):
    """A field of the answer's JSON is one of some values."""

    check: Literal["json_in"]
    path: str
    values: list[Any] | str = Field(min_length=1)
    """A list, or the template of one."""

    def passes(self, answer: Answer) -> bool:
        allowed = answer.value(self.values)
        found = answer.field(self.path)
        return isinstance(allowed, list) and any(equal(found, answer.value(value)) for value in allowed)


class ValidJson(Check):
    """The whole answer is one JSON object, with these fields."""

    check: Literal["valid_json"]
    required: list[str] = []
    only: bool = False
    """No fields but the required ones."""

    def passes(self, answer: Answer) -> bool:
        value = answer.json
        if not isinstance(value, Mapping) or any(name not in value for name in self.required):
            return False
        return not self.only or len(value) == len(self.required)


class Contains(Check):
    """The text holds all (or any) of some phrases."""

    check: Literal["contains"]
    phrases: list[str] = Field(min_length=1)
    any: bool = False

    def passes(self, answer: Answer) -> bool:
        text = normalise(answer.text)
        held = [bool(p) and p in text for p in (normalise(str(answer.value(p))) for p in self.phrases)]
        return any_of(held) if self.any else all(held)


class OneOf(Check):
    """Of some alternatives the text names exactly the expected one; naming several is no answer."""

    check: Literal["one_of"]
    alternatives: list[str] = Field(min_length=2)
    expected: str

    def passes(self, answer: Answer) -> bool:
        text, expected = normalise(answer.text), normalise(str(answer.value(self.expected)))
        named = {
            phrase
            for phrase in map(normalise, self.alternatives)
            if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text)
        }
        return named == {expected}


class NotContains(Check):
    """The text holds none of some phrases."""

    check: Literal["not_contains"]
    phrases: list[str] = Field(min_length=1)

    def passes(self, answer: Answer) -> bool:
        text = normalise(answer.text)
        return not any_of(normalise(str(answer.value(phrase))) in text for phrase in self.phrases)


class _Pattern(Check):
    pattern: str = Field(min_length=1, max_length=1_000)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a pattern: {error}") from None
        return value


class Matches(_Pattern):
    """The pattern is found in the text."""

    check: Literal["regex"]

    def passes(self, answer: Answer) -> bool:
        return re.search(self.pattern, answer.text) is not None


class NotMatches(_Pattern):
    """The pattern is not found in the text."""

    check: Literal["not_regex"]

    def passes(self, answer: Answer) -> bool:
        return re.search(self.pattern, answer.text) is None


class Length(Check):
    """The text has this many characters."""

    check: Literal["length"]
    min_chars: int = Field(0, ge=0)
    max_chars: int = Field(1_000_000, ge=1)

    def passes(self, answer: Answer) -> bool:
        return self.min_chars <= len(answer.text.strip()) <= self.max_chars


class ToolCalled(Check):
    """A tool was called, with these arguments among its own."""

    check: Literal["tool_called"]
    name: str
    arguments: dict[str, Any] = {}

    def passes(self, answer: Answer) -> bool:
        wanted = {key: answer.value(value) for key, value in self.arguments.items()}
        return any_of(
            call["name"] == self.name
            and all(equal(call["arguments"].get(key, MISSING), value) for key, value in wanted.items())
            for call in answer.calls
        )


class MaxToolCalls(Check):
    """No more tool calls than this."""

    check: Literal["max_tool_calls"]
    limit: int = Field(ge=0)

    def passes(self, answer: Answer) -> bool:
        return len(answer.calls) <= self.limit


AnyCheck = Annotated[
    JsonEquals
    | JsonIn
    | ValidJson
    | Contains
    | OneOf
    | NotContains
    | Matches
    | NotMatches
    | Length
    | ToolCalled
    | MaxToolCalls,
    Field(discriminator="check"),
]
any_of = any  # `Contains` has a field named `any`


def check_templates(value: Any) -> None:
    """Refuse unknown names in any template inside a configured value.

    Raises:
        InputError: with the template.
    """
    if isinstance(value, str):
        check_template("template", value)
    elif isinstance(value, Mapping):
        for part in value.values():
            check_templates(part)
    elif isinstance(value, list):
        for part in value:
            check_templates(part)


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool call in OpenAI's shape or flat, with its arguments parsed."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    parsed = parse_json(arguments) if isinstance(arguments, str) else arguments
    return {"name": function.get("name"), "arguments": parsed if isinstance(parsed, Mapping) else {}}
