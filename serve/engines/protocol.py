"""OpenAI's chat completions protocol: what a request may say, and the shape of every answer.

Unknown fields are ignored, as OpenAI's own extensions come and go; a known field that this engine cannot
honour is refused by name, because ignoring it would quietly change the answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cluster.settings.engines import EngineSettings
from data.template import is_text
from serve.engines.detokenise import TokenTexts
from serve.engines.generation import SamplingParams, TokenLogprob
from serve.engines.tool_choice import ToolChoice, forced_call
from serve.openai import ApiError

Json = dict[str, Any]
TokenId = Annotated[int, Field(ge=0)]
MAX_BIASES = 300  # OpenAI's


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value if value is not None else ()


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema with a name, as OpenAI takes it."""

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or JSON that keeps to a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self

    @property
    def document_schema(self) -> dict[str, Any] | None:
        """What the answer must keep to; `None` for free text."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.schema_ if self.json_schema is not None else None


class ChatRequest(BaseModel):
    """The fields of a chat completion request that this engine knows."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)

    model: str = Field(min_length=1, max_length=256)
    messages: list[Json] = Field(min_length=1)
    tools: list[Json] | None = None
    tool_choice: ToolChoice | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field((), max_length=16)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    response_format: ResponseFormat | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False


def parse_chat(document: Any, settings: EngineSettings) -> ChatRequest:
    """A request from its JSON document.

    Raises:
        ApiError: 400 with the name of the first wrong field.
    """
    try:
        request = ChatRequest.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in problem["loc"]) or None
        raise ApiError(400, f"{param or 'body'}: {problem['msg']}", param=param, code="invalid_value") from None
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages.{index}")
    _check_limit("n", request.n, settings.max_choices)
    _check_limit("top_logprobs", request.top_logprobs, settings.max_top_logprobs)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    if any(not text for text in request.stop):
        raise ApiError(400, "a stop string must not be empty", param="stop", code="invalid_value")
    _check_choice(request)
    return request


def _check_message(message: Json, place: str) -> None:
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise ApiError(400, "every message needs a role", param=f"{place}.role", code="invalid_value")
    if not isinstance(content, str | list | None):
        said = f"{place}.content must be a text or a list of parts"
        raise ApiError(400, said, param=f"{place}.content", code="invalid_value")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if not is_text(part):
            param = f"{place}.content.{number}"
            raise ApiError(400, f"{param}: this engine reads parts of text only", param=param, code="invalid_value")


def _check_choice(request: ChatRequest) -> None:
    try:
        forced = forced_call(request.tools, request.tool_choice)
    except ValueError as error:
        raise ApiError(400, f"tool_choice: {error}", param="tool_choice", code="invalid_value") from None
    if forced is not None and request.response_format and request.response_format.document_schema is not None:
        message = "tool_choice: a call that is asked for cannot also keep to response_format"
        raise ApiError(400, message, param="tool_choice", code="invalid_value")


def _check_limit(param: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise ApiError(400, f"{param}={value} must be at most {limit}", param=param, code="invalid_value")


def check_bias(request: ChatRequest, vocabulary: int) -> None:
    """Raise `ApiError` 400 for a bias on a token that the model does not have."""
    if (unknown := next((i for i in request.logit_bias or () if i >= vocabulary), None)) is not None:
        message = f"logit_bias: token id {unknown} must be below {vocabulary}"
        raise ApiError(400, message, param="logit_bias", code="invalid_value")


def sampling_params(request: ChatRequest, prompt_tokens: int, context: int, default_max_tokens: int) -> SamplingParams:
    """How to sample, with the answer's length fitted into the context.

    Raises:
        ApiError: 400 `context_length_exceeded`.
    """
    asked = request.max_completion_tokens or request.max_tokens
    room = context - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = f"{prompt_tokens} in the messages" + (f" and {asked} in the completion" if asked else "")
        message = f"This model's maximum context length is {context} tokens; you asked for {wanted}."
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    return SamplingParams(
        max_tokens=asked or min(default_max_tokens, room),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=request.stop,
        logprobs=bool(request.logprobs),
        top_logprobs=request.top_logprobs or 0,
        ignore_eos=request.ignore_eos,
        json_schema=request.response_format.document_schema if request.response_format else None,
        call_schema=forced_call(request.tools, request.tool_choice),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple((request.logit_bias or {}).items()),
    )


@dataclass(frozen=True, slots=True)
class Header:
    """What every chunk of one answer repeats."""

    id: str
    model: str
    created: int
    fingerprint: str
    prompt_ids: list[int]
    return_token_ids: bool

    @classmethod
    def of(cls, request: ChatRequest, completion_id: str, fingerprint: str, prompt_ids: list[int]) -> "Header":
        """The header of a request's answer."""
        return cls(completion_id, request.model, int(time.time()), fingerprint, prompt_ids, request.return_token_ids)

    def document(self, kind: str) -> Json:
        """The top level of a completion or a chunk."""
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return named | {"system_fingerprint": self.fingerprint}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts as OpenAI reports them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def logprobs_document(texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> Json:
    """OpenAI's `logprobs` object for some tokens; entry `i` belongs to token `i`, the end token included."""
    content = []
    for token_id, known in zip(token_ids, logprobs, strict=True):
        entry = _logprob_entry(texts, token_id, known.logprob)
        entry["top_logprobs"] = [_logprob_entry(texts, other, value) for other, value in known.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _logprob_entry(texts: TokenTexts, token_id: int, logprob: float) -> Json:
    text, data = texts.get(token_id)
    return {"token": text, "logprob": logprob, "bytes": data}
