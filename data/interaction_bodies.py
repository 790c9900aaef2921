"""The bodies of what an agent did: interactions, calls of tools, trajectories."""

from typing import Any, Literal

from pydantic import Field

from data.event_body import Body
from data.item_fields import Digest, Metadata, Modality, SpanId, Tier, TokenId

Arm = Literal["stable", "candidate", "shadow", "none"]
Message = dict[str, Any]
"""An OpenAI chat message: `role`, `content`, and where they apply `tool_calls`, `tool_call_id`."""


class ToolCall(Body):
    """One call of a tool by an agent, and what came of it."""

    name: str = Field(min_length=1, max_length=256)
    call_id: str | None = Field(None, max_length=256)
    """As in the assistant's message: `tool_calls[].id`."""
    arguments: dict[str, Any] | str | None = None
    """The object; text where the model wrote something that is no object."""
    result: Any = None
    """Whatever the tool answered, as JSON."""
    error: str | None = Field(None, max_length=2_000)
    """What went wrong, where something did."""
    latency_s: float | None = Field(None, ge=0)
    trace_id: str | None = Field(None, max_length=64)
    span_id: SpanId | None = None
    parent_span_id: SpanId | None = None
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class InteractionFlags(Body):
    """What was unusual about an interaction."""

    fallback: bool = False
    """The candidate was assigned but stable answered."""
    shadow: bool = False
    """Nobody saw this answer."""
    disconnected: bool = False
    """The client went away before the end."""
    safety: bool = False
    """A filter stopped the answer. That the model refused is in its `refusal`."""
    quality: bool = False
    """The answer is empty, or was cut off at its limit of tokens."""
    timeout: bool = False
    error: str | None = None
    """OpenAI error code, when the request failed."""
    rejected: str | None = None
    """OpenAI error code, when the request was turned down for what it asks or for want of room: nobody's failure."""


ASSIGNMENT_FIELDS = (
    "assigned_version",
    "adapter_digest",
    "arm",
    "experiment_id",
    "propensity",
    "bucket",
    "assignment_unit",
    "split",
    "route_revision",
    "prompt_digest",
)
"""Fields of an interaction that only the router may fill in: experiments are counted by them."""


class Interaction(Body):
    """One request and its response, through the router or as an agent elsewhere reports it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] = Field([])
    """Calls made for this answer, where the reporter knows them; others come as events of their own."""
    context: list[str] = Field([])
    """Passages the answer may rest on."""
    response: Message | None = None
    finish_reason: str | None = None
    prompt_token_ids: list[TokenId] = Field([])
    completion_token_ids: list[TokenId] = Field([])
    completion_logprobs: list[float] = Field([])
    """Natural-log probabilities as the engine produced them, one a completion token."""
    parameters: dict[str, Any] = Field({})
    """Sampling parameters of the request: temperature, max_tokens, …"""
    requested: str = ""
    """The `model` the client asked for: an agent or a version."""
    assigned_version: str | None = None
    served_version: str | None = None
    adapter_digest: str | None = None
    arm: Arm = "none"
    """The arm assigned, which is the arm all analysis goes by."""
    experiment_id: str | None = None
    propensity: float | None = Field(None, gt=0, le=1)
    """Probability of the assigned arm."""
    bucket: float | None = Field(None, ge=0, lt=1)
    assignment_unit: Literal["user", "session", "request"] | None = None
    split: list[tuple[str | None, float, float]] | None = None
    """Experiment, start and share of every candidate in force, where there are several; `propensity` tells of one."""
    route_revision: int | None = None
    prompt_digest: Digest | None = None
    """Of the agent's prompt (`data.prompt`) that `messages` begin with."""
    latency_s: float = Field(0.0, ge=0)
    ttft_s: float | None = Field(None, ge=0)
    """Time to first token."""
    modality: Modality = "text"
    user_tier: Tier | None = None
    metadata: Metadata = Field({})
    trace_id: str | None = Field(None, max_length=64)
    span_id: SpanId | None = None
    parent_span_id: SpanId | None = None
    flags: InteractionFlags = InteractionFlags()


class Trajectory(Body):
    """Several steps of an agent with tool calls, graded as a whole."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] = Field([])
    """Arguments, results, latency and errors of the calls, in order, where the reporter knows them."""
    reward: float | None = Field(None, ge=0, le=1)
    outcome: str | None = Field(None, max_length=512)
    latency_s: float | None = Field(None, ge=0)
    trace_id: str | None = Field(None, max_length=64)
    span_id: SpanId | None = None
    parent_span_id: SpanId | None = None
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata = Field({})
