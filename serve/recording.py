"""What the client writes down of a prediction, a tool call or a trajectory.

Everything here is read from the agent's own objects, so nothing may fail because of them: what cannot be read
is described as text.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Record = Callable[[str, dict[str, Any]], object]
"""Takes a path of the intake and an item."""

TRACES, TRAJECTORIES = "/v1/traces", "/v1/trajectories"
MAX_TEXT_CHARS = 100_000  # the intake refuses a longer text
MAX_PIECES = 10_000  # of a stream, where they are kept as they are


@dataclass(frozen=True, slots=True)
class Speaker:
    """On whose behalf the agent works."""

    user: str | None = None
    session: str | None = None


@dataclass(slots=True)
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: Any
    result: Any = None
    error: BaseException | None = None
    latency_s: float = 0.0

    def messages(self) -> list[Message]:
        """As two messages of a chat: the call, and what came back, with its latency and its error."""
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        function = {"name": self.name, "arguments": text_of(self.arguments)}
        answer: Message = {
            "role": "tool",
            "tool_call_id": call_id,
            "name": self.name,
            "content": text_of(self.result) if self.error is None else "",
            "latency_s": round(self.latency_s, 6),
        }
        if self.error is not None:
            answer["error"] = f"{type(self.error).__name__}: {self.error}"
        call = {"id": call_id, "type": "function", "function": function}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}, answer]


@dataclass
class Trajectory:
    """The steps of an agent; predictions and tool calls inside its `with` add themselves."""

    record: Record
    about: dict[str, Any]
    """Fields of the item besides its steps: agent, user, session, metadata, tools."""
    messages: list[Message] = field(default_factory=list)
    outcome: str | None = None
    reward: float | None = None
    """In [0, 1], where the agent knows it."""
    _watched: list[Message] = field(default_factory=list)
    """Tool calls seen since the last prediction, which may tell of them itself."""

    def add(self, *messages: Message) -> None:
        """Append steps by hand."""
        self.messages += [*self._watched, *map(dict, messages)]
        self._watched = []

    def add_call(self, call: ToolCall) -> None:
        """Append a watched tool call."""
        self._watched += call.messages()

    def add_prediction(self, messages: Sequence[Message], response: Message | None) -> None:
        """Append what a prediction saw for the first time, and its answer."""
        known = 0
        while known < min(len(messages), len(self.messages)) and messages[known] == self.messages[known]:
            known += 1
        fresh = messages[known:]
        if any(message.get("role") == "tool" for message in fresh):
            self._watched = []  # the agent's own record of the same calls
        self.add(*fresh)
        if response is not None:
            self.messages.append(dict(response))

    def finish(self) -> None:
        """Record it."""
        self.add()
        if self.messages:
            known = {"outcome": self.outcome, "reward": self.reward} | self.about
            self.record(TRAJECTORIES, stamped({"messages": clipped(self.messages), **_given(known)}))


@dataclass
class Prediction:
    """One request and its answer, as the agent saw them."""

    record: Record
    about: dict[str, Any]
    """Fields of the item besides request and answer: agent, user, session, tools, metadata, …"""
    messages: list[Message]
    trajectory: Trajectory | None = None
    interaction_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """What feedback refers to."""
    response: Message | None = None
    reply_of: Callable[[Any], Any] | None = None
    _calls: list[Message] = field(default_factory=list)
    _pieces: list[Any] = field(default_factory=list)
    _characters: int = 0
    _began: float = field(default_factory=time.perf_counter)
    _first: float | None = None
    _finished: bool = False

    def answer(self, result: Any) -> None:
        """Note the answer: a text, a chat message, or an OpenAI completion."""
        self.response = answer_message(self.reply_of(result) if self.reply_of else result)

    def piece(self, piece: Any) -> None:
        """Note a piece of a streamed answer: its text, as far as the intake would take it."""
        if self._first is None:
            self._first = time.perf_counter()
        text = None if self.reply_of else piece_text(piece)
        if text is not None and self._characters <= MAX_TEXT_CHARS:
            self._characters += len(text)
            self._pieces.append(text)
        elif text is None and len(self._pieces) < MAX_PIECES:
            self._pieces.append(piece)

    def add_call(self, call: ToolCall) -> None:
        """Note a tool call made on the way to the answer."""
        self._calls += call.messages()

    def finish(self, error: BaseException | None = None) -> None:
        """Record it, once. `error`: what it ended with."""
        if self._finished:
            return
        self._finished = True
        latency_s = time.perf_counter() - self._began
        if self._pieces:
            whole = not self.reply_of and all(isinstance(piece, str) for piece in self._pieces)
            self.answer("".join(self._pieces) if whole else self._pieces)
        messages = [*self.messages, *self._calls]
        known = {
            "response": clipped(self.response),
            "latency_s": latency_s,
            "ttft_s": None if self._first is None else self._first - self._began,
            "flags": flags(error),
            "interaction_id": self.interaction_id,
        }
        item = {"messages": clipped(messages), **_given(known | self.about)}
        # Under this id, two reports of one answer are one event.
        self.record(TRACES, stamped(item) | {"event_id": f"interaction:{self.interaction_id}"})
        if self.trajectory is not None:
            self.trajectory.add_prediction(messages, self.response)


def stamped(item: dict[str, Any]) -> dict[str, Any]:
    """With an id, which makes a retry harmless, and the time."""
    return {"event_id": str(uuid.uuid4()), "occurred_at": time.time(), **item}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def flags(error: BaseException | None) -> dict[str, Any] | None:
    """What was unusual: an error by its code or type, or that the reader went away."""
    if error is None:
        return None
    if isinstance(error, Exception):
        code = getattr(error, "code", None)
        return {"error": code if isinstance(code, str) else type(error).__name__}
    return {"disconnected": True}


def clipped(value: Any) -> Any:
    """The value with over-long texts cut to what the intake takes."""
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT_CHARS else value[: MAX_TEXT_CHARS - 1] + "…"
    if isinstance(value, Mapping):
        return {name: clipped(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [clipped(inner) for inner in value]
    return value


def request_messages(arguments: Mapping[str, Any]) -> list[Message]:
    """The request in the arguments of a function: `messages`, else the first text, else all of them as JSON."""
    found = arguments.get("messages")
    if isinstance(found, (list, tuple)) and all(isinstance(m, Mapping) and "role" in m for m in found):
        return [dict(message) for message in found]
    text = next((value for value in arguments.values() if isinstance(value, str)), None)
    if text is None:
        text = text_of({name: value for name, value in arguments.items() if name not in ("self", "cls")})
    return [{"role": "user", "content": text}]


def answer_message(result: Any) -> Message | None:
    """The answer in what a function returned."""
    if result is None:
        return None
    if isinstance(result, str):
        return {"role": "assistant", "content": result}
    choices = getattr(result, "choices", None) or (result.get("choices") if isinstance(result, Mapping) else None)
    if choices:
        first = choices[0]
        result = first["message"] if isinstance(first, Mapping) else getattr(first, "message", result)
    if callable(dump := getattr(result, "model_dump", None)):
        result = dump(exclude_none=True)
    if isinstance(result, Mapping) and "role" in result:
        return dict(result)
    return {"role": "assistant", "content": text_of(result)}


def piece_text(piece: Any) -> str | None:
    """The text in one piece of a stream, a text or a chunk of an OpenAI stream; `None` in anything else."""
    if isinstance(piece, str):
        return piece
    choices = getattr(piece, "choices", None)
    if choices is None:
        return None
    text = getattr(getattr(choices[0], "delta", None), "content", None) if choices else None
    return text if isinstance(text, str) else ""


def text_of(value: Any) -> str:
    """A text as it is, anything else as JSON or, failing that, as Python shows it."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return repr(value)[:MAX_TEXT_CHARS]
