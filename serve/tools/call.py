"""One call of a tool as it came in, over HTTP or MCP."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.events import input_error
from data.intake.items import Id
from serve.openai import ApiError

PATH, MCP_PATH = "/v1/tools", "/mcp"
"""Where calls come in."""


class Call(BaseModel):
    """The arguments, and what the caller says of the trajectory that the call belongs to.

    Ids are as the event log takes them, so that every call can be recorded.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    arguments: Any = {}
    interaction_id: Id | None = None
    session: Id | None = None
    agent: Id | None = None
    user: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    call_id: Id | None = None
    """As in the assistant's message: `tool_calls[].id`."""
    idempotency_key: Id | None = None
    """Where a tool writes; `call_id` stands in for it."""

    @property
    def about(self) -> dict[str, Any]:
        """The fields of the event, beside the arguments, that the caller has set."""
        return self.model_dump(include=set(ABOUT), exclude_none=True)


ABOUT = ("interaction_id", "session", "agent", "user", "call_id")
FIELDS = frozenset(Call.model_fields)


def parse_call(document: Mapping[str, Any]) -> Call:
    """A call from its fields.

    Raises:
        ApiError: 400 with the name of the field.
    """
    try:
        return Call.model_validate(dict(document))
    except ValidationError as error:
        found = input_error(error, f"known are {', '.join(sorted(FIELDS))}")
        raise ApiError(400, str(found), param=found.field, code="invalid_value") from None
