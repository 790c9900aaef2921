"""The three formats of OpenAI's fine-tuning files, line by line: which one a file has, and what is wrong.

- `chat` (supervised): ``{"messages": [...], "tools": [...]}``, ended by the assistant;
- `preference` (dpo): ``{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}``;
- `item` (reinforcement): ``{"messages": [...], ...}``, ended by the user, with fields that a grader reads.

Source: https://platform.openai.com/docs/api-reference/fine-tuning
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from cluster.errors import InputError
from data.rows import Row, read_rows

Format = Literal["chat", "preference", "item"]
Json = dict[str, Any]
METHOD_FORMATS: dict[str, Format] = {"supervised": "chat", "dpo": "preference", "reinforcement": "item"}
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "weight", "refusal"}
CHAT_FIELDS = {"messages", "tools", "parallel_tool_calls"}
PAIR_FIELDS = {"input", "preferred_output", "non_preferred_output"}
SHOWN = 5  # bad lines named in one message
MEND = "mend the line and upload the file again"


@dataclass(frozen=True)
class Checked:
    """A file that holds what its format asks for."""

    format: Format
    rows: int


class LineError(InputError):
    """Lines of an uploaded file break a rule; `line` is the first of them, from 1."""

    def __init__(self, line: int, field: str, value: Any, rule: str, remedy: str) -> None:
        super().__init__(field, value, rule, remedy)
        self.line = line

    def __reduce__(self) -> Any:
        return type(self), (self.line, self.field, self.value, self.rule, self.remedy)

    def __str__(self) -> str:
        return f"line {self.line}: {super().__str__()}"


def check_file(path: Path, *, min_rows: int = 1, max_rows: int = 2**31) -> Checked:
    """Read a whole file and find its format.

    Raises:
        LineError: a line is no JSON, breaks a rule of its format, or has another format than the first.
        InputError: the file is empty, too short or too long.
    """
    found: Format | None = None
    number = 0
    bad: list[LineError] = []
    for row in itertools.islice(read_rows(path), max_rows + 1):
        number += 1
        try:
            found = _check_line(row, found)
        except InputError as error:
            bad.append(LineError(row.number, error.field, error.value, error.rule, error.remedy))
            if len(bad) > SHOWN:
                break
    if bad:
        raise _together(bad)
    if number > max_rows:
        raise InputError("file", path.name, f"has more than {max_rows} lines", "split it or raise the limit")
    if number < min_rows:
        raise InputError("file", path.name, f"has {number} lines, fewer than {min_rows}", "add examples")
    assert found is not None
    return Checked(found, number)


def _together(bad: list[LineError]) -> LineError:
    """The first bad line, naming the next few."""
    first, others = bad[0], [str(error.line) for error in bad[1:]]
    if not others:
        return first
    more = "" if len(bad) <= SHOWN else " and possibly more"
    return LineError(
        first.line, first.field, first.value, first.rule, f"{first.remedy} (lines {', '.join(others)} too{more})"
    )


def _check_line(row: Row, expected: Format | None) -> Format:
    if row.error is not None:
        raise row.error
    found = check_row(row.value)
    if expected is not None and found != expected:
        rule = f"has the format `{found}`, the lines before have `{expected}`"
        raise InputError("format", found, rule, "keep one format in one file")
    return found


def check_row(value: Any) -> Format:
    """The format of one line.

    Raises:
        InputError: it has none, or breaks a rule of it.
    """
    if not isinstance(value, dict):
        raise InputError("line", value, "must be a JSON object", MEND)
    if PAIR_FIELDS & value.keys():
        _check_pair(value)
        return "preference"
    if "messages" not in value:
        rule = "must hold `messages`, or `input`, `preferred_output` and `non_preferred_output`"
        raise InputError("line", sorted(map(str, value)), rule, MEND)
    messages = _check_messages(value["messages"], "messages")
    if messages[-1]["role"] == "assistant":
        _check_known(value, CHAT_FIELDS, "")
        _check_tools(value.get("tools"), "tools")
        if not any(learned(message) for message in messages):
            raise InputError("messages", "weight 0", "leaves no assistant message to learn from", MEND)
        return "chat"
    _check_tools(value.get("tools"), "tools")
    return "item"


def learned(message: Json) -> bool:
    """True for an assistant message that is to be learned."""
    return bool(message["role"] == "assistant" and message.get("weight", 1) != 0)


def _check_pair(value: Json) -> None:
    missing = sorted(PAIR_FIELDS - value.keys())
    if missing:
        raise InputError(missing[0], None, "is missing", MEND)
    _check_known(value, PAIR_FIELDS, "")
    if not isinstance(value["input"], dict):
        raise InputError("input", value["input"], "must be an object with `messages`", MEND)
    _check_known(value["input"], CHAT_FIELDS, "input.")
    _check_tools(value["input"].get("tools"), "input.tools")
    prompt = _check_messages(value["input"].get("messages"), "input.messages")
    if prompt[-1]["role"] == "assistant":
        raise InputError("input.messages", "assistant", "must not end with the assistant", "move that turn out")
    outputs = [_check_output(value[name], name) for name in ("preferred_output", "non_preferred_output")]
    if outputs[0] == outputs[1]:
        raise InputError("non_preferred_output", "the same", "equals preferred_output", "drop the pair")


def _check_output(value: Any, name: str) -> list[Json]:
    messages = _check_messages(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError(name, [m["role"] for m in messages], "must be one assistant message", MEND)
    return messages


def _check_messages(value: Any, name: str) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise InputError(name, value, "must be a list of messages, not an empty one", MEND)
    for place, message in enumerate(value):
        _check_message(message, f"{name}.{place}")
    return value


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise InputError(name, message, "must be an object", MEND)
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{name}.role", role, f"must be one of {', '.join(ROLES)}", MEND)
    _check_known(message, MESSAGE_FIELDS, f"{name}.")
    _check_content(message, name)
    if "weight" in message and (role != "assistant" or message["weight"] not in (0, 1)):
        raise InputError(f"{name}.weight", message["weight"], "must be 0 or 1, on an assistant message", MEND)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise InputError(f"{name}.tool_call_id", message.get("tool_call_id"), "must name the call it answers", MEND)
    if message.get("tool_calls") is not None:
        _check_calls(message, name)


def _check_content(message: Json, name: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if isinstance(content, list) and content:
        for place, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"{name}.content.{place}", part, "must be a text part", "train on text only")
        return
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return
    raise InputError(f"{name}.content", content, "must be text", MEND)


def _check_calls(message: Json, name: str) -> None:
    calls = message["tool_calls"]
    if message["role"] != "assistant" or not isinstance(calls, list) or not calls:
        raise InputError(f"{name}.tool_calls", calls, "must be a list, on an assistant message", MEND)
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        where = f"{name}.tool_calls.{place}"
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(where, call, "must be a function call with a name", MEND)
        if not _is_object(function.get("arguments")):
            raise InputError(f"{where}.function.arguments", function.get("arguments"), "must be a JSON object", MEND)


def _is_object(arguments: Any) -> bool:
    try:
        return isinstance(orjson.loads(arguments) if isinstance(arguments, str) else arguments, dict)
    except orjson.JSONDecodeError:
        return False


def _check_tools(tools: Any, name: str) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise InputError(name, tools, "must be a list of functions", MEND)
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{name}.{place}", tool, "must be a function with a name", MEND)


def _check_known(value: Json, known: Iterable[str], name: str) -> None:
    for unknown in value.keys() - set(known):
        rule = f"is no field of this format; it has {', '.join(sorted(known))}"
        raise InputError(f"{name}{unknown}", value[unknown], rule, "take it out")


def check_against_grader(path: Path, check: Callable[[Json], None]) -> None:
    """Hand every item of a file to `check`, which raises InputError where a grader cannot read it.

    Raises:
        LineError: with the first such line.
    """
    for row in read_rows(path):
        try:
            check(row.value)
        except InputError as error:
            raise LineError(row.number, error.field, error.value, error.rule, error.remedy) from None
