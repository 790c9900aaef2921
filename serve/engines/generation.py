"""What one answer asks for and what comes back while it is made. No torch: the HTTP side imports this."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    """Keep the log-prob, in nats and before temperature, of every chosen token."""
    top_logprobs: int = 0
    json_schema: dict[str, Any] | None = None
    """The answer must be a JSON document that keeps to it."""
    call_schema: dict[str, Any] | None = None
    """The answer must be one tool call that keeps to it, written as `data.tool_calls` reads it."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """The same, for each time it has them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token id and what is added to its logit."""
    ignore_eos: bool = False

    @property
    def is_biased(self) -> bool:
        """Logits are changed before a token is chosen."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log-prob, and the likeliest tokens in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TextSource(Protocol):
    """Turns the tokens of one answer into text (detokenise.AnswerText)."""

    def push(self, token_ids: Sequence[int]) -> None:
        """Take more tokens."""

    @property
    def stopped(self) -> bool:
        """True once a stop string appeared."""

    def take(self, *, final: bool) -> str:
        """Text that is certain since the last call; everything left when `final`."""


@dataclass(slots=True, eq=False)
class Generation:
    """One answer in the making. Owned by the step loop once submitted; others only set `cancelled`."""

    prompt: list[int]
    params: SamplingParams
    text: TextSource
    adapter: Any = None
    """The loaded adapter (lora.LoadedAdapter), or `None` for the base."""
    index: int = 0
    """Its place among the choices of its request."""
    stream: bool = False
    inbox: Any = None
    """Where the engine delivers updates (an asyncio queue)."""
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    length: int = 0
    """Tokens whose keys and values are in the cache."""
    flushed: int = 0
    """Tokens already sent to the inbox."""
    flushed_at: float = 0.0
    constraint: Any = None
    """What the answer must keep to (structured.Constraint), or `None`."""
    draws: random.Random = field(default_factory=random.Random)
    """Its own random numbers, one a token."""


@dataclass(frozen=True, slots=True)
class Update:
    """News of one answer: tokens since the last update, and its end."""

    generation: Generation
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None = None
    error: str | None = None
