"""Where an agent's prompt enters a request, and its learned policy: as text in the system prompt.

The prompt (`data.prompt`) comes first and is the same for everybody; the record has it as the engine reads it. Of the
policy the router knows no traits. Whoever learns them implements `PromptPolicy`; what it rendered is recorded with the
interaction, so a later reward can be credited to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.interaction_bodies import Message
from data.prompt import SYSTEM_ROLES, AgentPrompt, with_prompt
from serve.arms import Plan
from serve.openai import ApiError, shown


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a policy says for one answer."""

    text: str
    version: str
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    """What credit assignment needs later, such as the offsets of perturbed traits: at most a few short values."""

    def metadata(self) -> dict[str, str | int | float]:
        """As it is recorded."""
        return {"policy_version": self.version} | dict(self.details)


def prompted(request: dict[str, Any], prompt: AgentPrompt, *, is_chat: bool) -> dict[str, Any]:
    """A request with the agent's prompt at its head.

    Raises:
        ApiError: 400 for a completion of plain text, where no prompt has a place.
    """
    if not is_chat:
        message = f"{shown(request['model'])} has a prompt and answers chats only; use /v1/chat/completions."
        raise ApiError(400, message, code="chat_only", param="model")
    return request | {"messages": with_prompt(request["messages"], prompt.text)}


class PromptPolicy(Protocol):
    """Asked once a request, on the event loop: must answer from memory, at once."""

    def render(self, tenant: str, plan: Plan, user: str | None) -> Rendered | None:
        """The text for this answer, or `None` where the agent has no policy. `user` is a pseudonym."""
        ...


def with_policy(messages: list[Message], rendered: Rendered) -> list[Message]:
    """The messages with the text at the end of the first system message, or in one of its own."""
    first = messages[0]
    if first.get("role") not in SYSTEM_ROLES:
        return [{"role": "system", "content": rendered.text}, *messages]
    content = first.get("content")
    if isinstance(content, list):
        longer: Any = [*content, {"type": "text", "text": rendered.text}]
    else:
        longer = f"{content}\n\n{rendered.text}" if content else rendered.text
    return [first | {"content": longer}, *messages[1:]]
