"""Spans of instrumented agents become items: chat spans interactions, tool spans tool calls, agent spans
trajectories.

Understood are OpenTelemetry's semantic conventions for generative AI as attributes (`gen_ai.input.messages`,
`gen_ai.output.messages`), the same on the event `gen_ai.client.inference.operation.details`, their older
form as one event a message (`gen_ai.user.message`, `gen_ai.choice`), and the flat attributes of OpenLLMetry
(`gen_ai.prompt.0.content`). Other spans are passed over.
Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InputError
from data.traces.messages import Conversation, conversation, parsed, tool_definitions
from data.traces.otlp import Attributes, Span

Item = dict[str, Any]

CHAT = frozenset({"chat", "text_completion", "generate_content", "completion"})
TOOL = "execute_tool"
AGENT = frozenset({"invoke_agent", "invoke_workflow"})
RETRIEVAL = "retrieval"
PARAMETERS = {
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_p": "top_p",
    "gen_ai.request.top_k": "top_k",
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.request.seed": "seed",
    "gen_ai.request.stop_sequences": "stop",
    "gen_ai.request.frequency_penalty": "frequency_penalty",
    "gen_ai.request.presence_penalty": "presence_penalty",
    "gen_ai.request.choice.count": "n",
}
METADATA = "rayloop.metadata."
UNNAMED_SERVICE = "unknown_service"
SHOWN_ERROR = 2_000
CAPTURE_REMEDY = "set OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=true where the agent runs"


@dataclass(frozen=True, slots=True)
class Found:
    """One GenAI span and what it gives."""

    span: Span
    kind: str
    item: Item
    error: InputError | None = None
    """Why it gives nothing."""


def items_of(spans: Sequence[Span]) -> list[Found]:
    """What the GenAI spans of one export give; a bad one carries its error."""
    trace = _Traces(spans)
    return [_found(span, trace) for span in spans if _kind(span) is not None]


def _found(span: Span, trace: "_Traces") -> Found:
    kind = _kind(span)
    assert kind is not None
    try:
        make = {"interaction": _interaction, "tool_call": _tool_call, "trajectory": _trajectory}[kind]
        item = make(span, trace)
    except InputError as error:
        return Found(span, kind, {}, error)
    return Found(span, kind, {name: value for name, value in item.items() if value is not None})


def _kind(span: Span) -> str | None:
    operation = _operation(span)
    if operation in CHAT:
        return "interaction"
    if operation == TOOL:
        return "tool_call"
    return "trajectory" if operation in AGENT else None


def _operation(span: Span) -> Any:
    return span.attributes.get("gen_ai.operation.name", span.attributes.get("llm.request.type"))


@dataclass
class _Traces:
    """The spans of an export by how they hang together."""

    spans: Sequence[Span]
    by_id: dict[tuple[str, str], Span] = field(init=False)
    conversations: dict[tuple[str, str], Conversation] = field(init=False)
    """Of chat spans whose messages can be read."""
    askers: dict[tuple[str, str], Span] = field(init=False)
    """(trace, id of a tool call) -> the chat span whose answer asked for it."""

    def __post_init__(self) -> None:
        self.by_id = {(s.trace_id, s.span_id): s for s in self.spans}
        self.conversations, self.askers = {}, {}
        for span in self.spans:
            if _kind(span) == "interaction":
                self._read(span)

    def _read(self, span: Span) -> None:
        try:
            talk = conversation(span)
        except InputError:  # said again, with its place, when the span's own turn comes
            return
        self.conversations[span.trace_id, span.span_id] = talk
        for call in (talk.response or {}).get("tool_calls", []):
            self.askers[span.trace_id, str(call.get("id"))] = span

    def ancestors(self, span: Span) -> Iterator[Span]:
        """The span's parents, the nearest first, as far as they came along."""
        seen = {span.span_id}
        while span.parent_id is not None and span.parent_id not in seen:
            seen.add(span.parent_id)
            above = self.by_id.get((span.trace_id, span.parent_id))
            if above is None:
                return
            yield above
            span = above

    def below(self, agent: Span) -> list[Span]:
        """The spans under an agent's, in order of time."""
        found = [s for s in self.spans if s is not agent and any(a is agent for a in self.ancestors(s))]
        return sorted(found, key=lambda s: (s.start_ns, s.span_id))

    def passages(self, chat: Span) -> list[str]:
        """Texts that retrievals of the same trace had brought before a chat began."""
        found: list[str] = []
        for span in self.spans:
            if span.trace_id == chat.trace_id and _operation(span) == RETRIEVAL and span.end_ns <= chat.start_ns:
                documents = parsed(span.attributes.get("gen_ai.retrieval.documents"))
                found += _texts(documents if isinstance(documents, list) else [])
        return found


def _texts(documents: Iterable[Any]) -> list[str]:
    found = (d.get("content", d.get("text")) if isinstance(d, dict) else d for d in documents)
    return [text for text in found if isinstance(text, str)]


def _interaction(span: Span, trace: _Traces) -> Item:
    attributes = span.attributes
    talk = trace.conversations.get((span.trace_id, span.span_id)) or conversation(span)
    if not talk.messages:
        raise InputError("gen_ai.input.messages", None, "is missing", CAPTURE_REMEDY)
    finish_reason = talk.finish_reason
    error = attributes.get("error.type", span.error)
    return _envelope(span, trace) | {
        "interaction_id": interaction_id(span),
        "messages": talk.messages,
        "response": talk.response,
        "tools": tool_definitions(attributes.get("gen_ai.tool.definitions")),
        "context": trace.passages(span) + _texts(_listed(attributes.get("rayloop.context"))),
        "finish_reason": finish_reason,
        "parameters": {name: attributes[key] for key, name in PARAMETERS.items() if key in attributes},
        "requested": attributes.get("gen_ai.request.model"),
        "served_version": attributes.get("gen_ai.response.model"),
        "ttft_s": attributes.get("gen_ai.response.time_to_first_chunk"),
        "flags": {
            "safety": finish_reason == "content_filter",
            "quality": finish_reason == "length",
            **({} if error is None else {"error": str(error)[:SHOWN_ERROR]}),
        },
    }


def trace_session(trace_id: str) -> str:
    """The session of spans that name neither user nor session: by it an erasure finds the steps of somebody's run."""
    return f"trace-{trace_id}"


def interaction_id(span: Span) -> str:
    """Under what feedback is given: as the agent says, else the provider's id of the answer, else the span's."""
    own = span.attributes.get("rayloop.interaction_id")
    given = span.attributes.get("gen_ai.response.id") if own is None else own
    return str(given) if given else f"span-{span.trace_id}-{span.span_id}"


def _tool_call(span: Span, trace: _Traces) -> Item:
    call_id = span.attributes.get("gen_ai.tool.call.id")
    asker = trace.askers.get((span.trace_id, str(call_id))) if call_id is not None else None
    return (
        _envelope(span, trace)
        | _call(span)
        | {
            "event_id": f"tool-{span.trace_id}-{span.span_id}",
            "interaction_id": None if asker is None else interaction_id(asker),
        }
    )


def _call(span: Span) -> Item:
    attributes = span.attributes
    arguments = parsed(attributes.get("gen_ai.tool.call.arguments"))
    if arguments is not None and not isinstance(arguments, dict):
        arguments = str(attributes["gen_ai.tool.call.arguments"])
    error = attributes.get("error.type") if span.error is None else span.error
    return {
        "name": attributes.get("gen_ai.tool.name") or span.name.removeprefix(f"{TOOL} "),
        "call_id": attributes.get("gen_ai.tool.call.id"),
        "arguments": arguments,
        "result": parsed(attributes.get("gen_ai.tool.call.result")),
        "error": None if error is None else str(error)[:SHOWN_ERROR],
        "latency_s": span.latency_s,
    }


def _trajectory(span: Span, trace: _Traces) -> Item:
    """The longest conversation there is: the agent's own attributes often hold its first and last turn only.

    None where the spans below it came in other requests; `data.traces.join` puts them together.
    """
    below = trace.below(span)
    talks = [conversation(span)]
    talks += [t for s in below if (t := trace.conversations.get((s.trace_id, s.span_id))) is not None]
    messages = max((talk.whole for talk in talks), key=len)
    if not messages and any(_kind(s) == "interaction" for s in below):
        raise InputError("gen_ai.input.messages", None, "is missing, as in the spans below it", CAPTURE_REMEDY)
    calls = [_call(s) for s in below if _operation(s) == TOOL]
    offered = (tool_definitions(s.attributes.get("gen_ai.tool.definitions")) for s in (span, *below))
    error = span.attributes.get("error.type", span.error)
    return _envelope(span, trace) | {
        "event_id": f"trajectory-{span.trace_id}-{span.span_id}",
        "messages": messages,
        "tools": next(filter(None, offered), None),
        "tool_calls": [{k: v for k, v in call.items() if v is not None} for call in calls],
        "outcome": None if error is None else f"error: {error}"[:512],
    }


def _envelope(span: Span, trace: _Traces) -> Item:
    """The fields that all three kinds share; what an ancestor says holds for the spans below it."""
    around = [span, *trace.ancestors(span)]
    metadata: dict[str, Any] = {}
    for each in reversed(around):
        metadata |= {k.removeprefix(METADATA): v for k, v in each.attributes.items() if k.startswith(METADATA)}
    if (provider := _first([span], "gen_ai.provider.name", "gen_ai.system")) is not None:
        metadata.setdefault("provider", str(provider))
    user = _first(around, "user.id", "enduser.id")
    session = _identifier(_first(around, "gen_ai.conversation.id", "session.id"))
    return {
        "user": user,
        "session": session or (trace_session(span.trace_id) if user is None else None),
        "agent": _identifier(_first(around, "rayloop.agent", "gen_ai.agent.name") or _service(span.resource)),
        "occurred_at": span.start_ns / 1e9 if span.start_ns else None,
        "latency_s": span.latency_s,
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_span_id": _above(span, around[1:]),
        "modality": _first(around, "rayloop.modality"),
        "user_tier": _first(around, "rayloop.user_tier"),
        "metadata": metadata or None,
    }


def _above(span: Span, ancestors: Sequence[Span]) -> str | None:
    """The nearest ancestor that is an item of its own; where none is known, what the last known one hangs on."""
    named = next((above.span_id for above in ancestors if _kind(above) is not None), None)
    return named or (ancestors[-1] if ancestors else span).parent_id


def _first(spans: Iterable[Span], *names: str) -> Any:
    for span in spans:
        for name in names:
            if span.attributes.get(name) not in (None, ""):
                return span.attributes[name]
    return None


def _identifier(value: Any) -> Any:
    """A name as an id: agents are often called by several words, and ids have no blanks."""
    return re.sub(r"\s+", "-", value.strip()) if isinstance(value, str) else value


def _service(resource: Attributes) -> Any:
    name = resource.get("service.name")
    return None if isinstance(name, str) and name.startswith(UNNAMED_SERVICE) else name


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
