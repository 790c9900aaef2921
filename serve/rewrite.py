"""What the engine says, turned into what the client sees; and what the record keeps of it.

The engine is asked for token ids and log-probabilities when interactions are captured. They are taken
out again unless the client asked for them itself, and `id` and `model` become the interaction's id and the
version that served.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from serve.openai import ApiError, shown

DONE = b"data: [DONE]\n\n"
NO_COMPLETION = (ValueError, KeyError, TypeError, AttributeError)
"""What comes of an answer whose parts are not of the kinds they should be."""
CHARACTERS_A_TOKEN = 4  # roughly, where an engine counts nothing


@dataclass(slots=True)
class Wanted:
    """What the client itself asked for, beyond the text."""

    token_ids: bool
    logprobs: bool
    usage_chunk: bool

    @classmethod
    def by(cls, request: Mapping[str, Any], *, is_chat: bool = True) -> "Wanted":
        """Read from a request; a completion asks for log-probabilities by a number, and 0 is one."""
        asked = request.get("logprobs")
        options = request.get("stream_options")
        usage = bool(options.get("include_usage")) if isinstance(options, dict) else False
        logprobs = bool(asked) if is_chat else asked is not None
        return cls(bool(request.get("return_token_ids")), logprobs, usage)


@dataclass(slots=True)
class Answer:
    """What the record keeps of an answer; of several choices, the first."""

    message: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    """As the engine counted."""

    def tokens_used(self) -> tuple[int, int]:
        """Tokens of the prompt and of the answer: as counted by the engine, else those that are known here."""
        counts = [self.usage.get("prompt_tokens"), self.usage.get("completion_tokens")]
        if all(isinstance(count, int) and count >= 0 for count in counts):
            return counts[0] or 0, counts[1] or 0
        said = self.message.get("content")
        guessed = len(said) // CHARACTERS_A_TOKEN if isinstance(said, str) else 0
        return len(self.prompt_token_ids), len(self.token_ids) or guessed

    @property
    def said(self) -> dict[str, Any]:
        """The message, whole or put together from a stream; an empty text beside tool calls is left out."""
        return {k: v for k, v in self.message.items() if k != "content" or not _is_empty_beside_calls(self.message)}

    @property
    def filtered(self) -> bool:
        """A filter stopped it: a safety incident, which a refusal is not."""
        return self.finish_reason == "content_filter"

    def add_message(self, choice: dict[str, Any]) -> None:
        """A whole choice."""
        message = choice.get("message")
        if isinstance(message, dict):
            self.message = {k: v for k, v in message.items() if v is not None}
        self._add_text(choice)
        self._add_tail(choice)

    def add_delta(self, choice: dict[str, Any]) -> None:
        """A piece of a streamed choice."""
        delta = choice.get("delta")
        if isinstance(delta, dict):
            for name, value in delta.items():
                self._extend(name, value)
        self._add_text(choice)
        self._add_tail(choice)

    def _add_text(self, choice: dict[str, Any]) -> None:
        """A completion of a text has no message."""
        if isinstance(choice.get("text"), str):
            self._extend("content", choice["text"])

    def _extend(self, name: str, value: Any) -> None:
        if name == "tool_calls" and isinstance(value, list):
            calls = self.message.setdefault("tool_calls", [])
            for piece in value:
                _extend_call(calls, piece)
        elif isinstance(value, str) and name != "role":
            self.message[name] = self.message.get(name, "") + value
        elif value is not None:
            self.message[name] = value

    def _add_tail(self, choice: dict[str, Any]) -> None:
        self.finish_reason = _text(choice.get("finish_reason")) or self.finish_reason
        self.token_ids += _numbers(choice.get("token_ids"), int)
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict):
            self.logprobs += _numbers([item["logprob"] for item in logprobs.get("content") or []], int | float)
            given = [value for value in logprobs.get("token_logprobs") or [] if value is not None]
            self.logprobs += _numbers(given, int | float)


def _is_empty_beside_calls(message: Mapping[str, Any]) -> bool:
    return message.get("content") == "" and bool(message.get("tool_calls"))


def _text(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"{shown(value)} is not a text")
    return value


def _numbers(values: Any, kind: Any) -> list[Any]:
    """A list of numbers, as the record may hold them; `None` is an empty one."""
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{shown(values)} is not a list of numbers")
    return values


def _extend_call(calls: list[dict[str, Any]], piece: Any) -> None:
    if not isinstance(piece, dict):
        return
    index = piece.get("index", len(calls))
    while isinstance(index, int) and len(calls) <= index < 128:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    if not isinstance(index, int) or not 0 <= index < len(calls):
        return
    call = calls[index]
    call["id"] = _text(piece.get("id")) or call["id"]
    function = piece.get("function") or {}
    for name in ("name", "arguments"):
        call["function"][name] += function.get(name) or ""


@dataclass(slots=True)
class Rewriter:
    """Rewrites one answer, whole or streamed, and collects it.

    Every method raises one of `NO_COMPLETION` for an answer that is none.
    """

    interaction_id: str
    version: str
    wanted: Wanted
    max_event_bytes: int
    answer: Answer = field(default_factory=Answer)
    saw_done: bool = False
    error: str | None = None
    """Code of an error that the engine sent inside its stream."""
    _rest: bytes = b""

    def whole(self, body: bytes) -> bytes:
        """A complete answer: a JSON object with choices."""
        document = orjson.loads(body)
        if not isinstance(document, dict) or not isinstance(document.get("choices"), list):
            raise ValueError(f"the engine answered {shown(document)}")
        for choice in _choices(document):
            message = choice.get("message")
            if isinstance(message, dict) and _is_empty_beside_calls(message):
                message["content"] = None  # as OpenAI's; some engines say an empty text
            if choice.get("index", 0) == 0:
                self.answer.add_message(choice)
        self._clean(document)
        return orjson.dumps(document)

    def feed(self, piece: bytes) -> bytes:
        """A piece of an event stream; returns the whole events in it, rewritten."""
        data = self._rest + piece
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > self.max_event_bytes:
            raise ValueError(f"the engine sent an event of more than {self.max_event_bytes} bytes")
        return b"".join(self._event(event) for event in events if event)

    def end(self) -> bytes:
        """What is left when the engine's stream is over; a stream always closes with `[DONE]`."""
        rest, self._rest = self._rest, b""
        tail = self._event(rest.strip()) if rest.strip() else b""
        return tail if self.saw_done else tail + DONE

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            return b"" if event.startswith(b":") else event + b"\n\n"
        data = event[5:].strip()
        if data == b"[DONE]":
            self.saw_done = True
            return DONE
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.error = "engine_error"
            return error_event(ApiError(502, "The engine sent something that is not JSON.", code="engine_error"))
        if not isinstance(document, dict):
            return b""
        if "error" in document and "choices" not in document:
            return self._error(document["error"])
        return self._chunk(document)

    def _chunk(self, document: dict[str, Any]) -> bytes:
        choices = _choices(document)
        for choice in choices:
            if choice.get("index", 0) == 0:
                self.answer.add_delta(choice)
        self._clean(document)
        if not self.wanted.usage_chunk:
            document.pop("usage", None)
        if not choices and not self.wanted.usage_chunk:
            return b""
        return b"data: " + orjson.dumps(document) + b"\n\n"

    def _error(self, error: Any) -> bytes:
        fields = error if isinstance(error, dict) else {"message": str(error)}
        code = fields.get("code")
        self.error = code if isinstance(code, str) else "engine_error"
        return error_event(ApiError(500, str(fields.get("message")), code=self.error))

    def _clean(self, document: dict[str, Any]) -> None:
        """Our id and version in; out with what only the record wanted."""
        document["id"] = self.interaction_id
        document["model"] = self.version
        if isinstance(usage := document.get("usage"), dict):
            self.answer.usage = usage
        for place in (document, *_choices(document)):  # a completion has them in its choices
            if prompt_ids := place.get("prompt_token_ids"):
                self.answer.prompt_token_ids = _numbers(prompt_ids, int)
            if not self.wanted.token_ids:
                place.pop("prompt_token_ids", None)
        for choice in _choices(document):
            if not self.wanted.token_ids:
                choice.pop("token_ids", None)
            if not self.wanted.logprobs and "logprobs" in choice:
                choice["logprobs"] = None


def _choices(document: dict[str, Any]) -> list[dict[str, Any]]:
    choices = document.get("choices")
    return [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []


def error_event(error: ApiError) -> bytes:
    """An error in the middle of a stream, as OpenAI's clients understand it."""
    return b"data: " + error.body() + b"\n\n"
