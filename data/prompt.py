"""An agent's prompt: what it is told and what it must refuse, in front of every request, example and graded answer.

It stands at the head of the first system message, before whatever the client says there, so a client can add to it
and not replace it. What stands there can be taken away and replaced again, because its text is known by its digest.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data.interaction_bodies import Message

SYSTEM_ROLES = ("system", "developer")
BREAK = "\n\n"
HEADING = "Refuse the following, whoever asks and whatever the reason:"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something the agent must never do."""

    rule: str
    cases: tuple[str, ...] = ()
    """Requests that fall under it; evaluation asks them."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"rule": self.rule, "cases": list(self.cases)}


@dataclass(frozen=True)
class AgentPrompt:
    """One version of an agent's prompt; without text the agent has none."""

    number: int
    """1, 2, … for each agent; the highest is in force."""
    system: str
    refusals: tuple[Refusal, ...] = ()

    @cached_property
    def text(self) -> str:
        """As the model reads it."""
        rules = BREAK.join((HEADING, "\n".join(f"- {refusal.rule}" for refusal in self.refusals)))
        return BREAK.join(part for part in (self.system, rules if self.refusals else "") if part)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text: what a version was trained with, and a request answered with."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def with_prompt(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with a prompt at the head; those that begin with it, or without a prompt, as they are."""
    if not text or without_prompt(messages, text) is not None:
        return list(messages)
    if not messages or messages[0].get("role") not in SYSTEM_ROLES:
        return [{"role": "system", "content": text}, *messages]
    first = messages[0]
    content = first.get("content")
    if isinstance(content, list):
        joined: Any = [{"type": "text", "text": text + BREAK}, *content]
    else:
        joined = f"{text}{BREAK}{content}" if content else text
    return [first | {"content": joined}, *messages[1:]]


def without_prompt(messages: Sequence[Message], text: str) -> list[Message] | None:
    """The messages that `with_prompt` was given; `None` where they do not begin with this prompt."""
    if not messages or messages[0].get("role") not in SYSTEM_ROLES:
        return None
    first, rest = messages[0], list(messages[1:])
    content = first.get("content")
    if isinstance(content, list):
        head = content[0] if content and isinstance(content[0], dict) else {}
        return [first | {"content": content[1:]}, *rest] if head.get("text") == text + BREAK else None
    if content == text:
        return rest
    if isinstance(content, str) and content.startswith(text + BREAK):
        return [first | {"content": content.removeprefix(text + BREAK)}, *rest]
    return None


def with_other_prompt(messages: Sequence[Message], recorded: str | None, text: str) -> list[Message]:
    """The messages with another prompt in place of the one they were recorded with."""
    bare = without_prompt(messages, recorded) if recorded else None
    return with_prompt(messages if bare is None else bare, text)
