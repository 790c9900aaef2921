"""`tool_choice`: which tools an answer must call, as a schema of the one call it then is."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

Json = dict[str, Any]


class NamedFunction(BaseModel):
    """The function of a named choice."""

    name: str


class Choice(BaseModel):
    """Whether tools are called: as the model likes, never, some of them, or this one by its name."""

    type: Literal["auto", "none", "required", "function"]
    function: NamedFunction | None = None


def _with_a_type(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) and value != "function" else value


ToolChoice = Annotated[Choice, BeforeValidator(_with_a_type)]
"""As OpenAI takes it: a word, or an object that names a function."""


def forced_call(tools: Sequence[Json] | None, choice: Choice | None) -> Json | None:
    """JSON schema of the call that an answer must be; `None` where the model is free to call or not.

    Raises:
        ValueError: a call is asked for, and there is no such tool.
    """
    if choice is None or choice.type not in ("required", "function"):
        return None
    wanted = choice.function.name if choice.function is not None else None
    if choice.type == "function" and wanted is None:
        raise ValueError("names no function")
    functions = [tool.get("function") or {} for tool in tools or ()]
    chosen = [f for f in functions if isinstance(f.get("name"), str) and wanted in (None, f["name"])]
    if not chosen:
        raise ValueError(f"there is no tool {wanted!r} among tools" if wanted else "there are no tools to choose from")
    return {"anyOf": [_call(function) for function in chosen]}


def _call(function: Json) -> Json:
    fields = {"name": {"const": function["name"]}, "arguments": function.get("parameters") or {"type": "object"}}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
