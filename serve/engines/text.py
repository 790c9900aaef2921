"""`/v1/completions` of the embedded engine: the continuation of one prompt, as a text or as token ids.

The same generation as a chat's, without a template, and in the older shape: `choices[].text`, log-probabilities as
parallel lists.
"""

import uuid
from typing import TYPE_CHECKING, Any

from cluster.errors import NotFoundError
from serve.engines.chat_answer import ChatAnswer
from serve.engines.generation import Update
from serve.engines.protocol import ChatRequest, Header, Json, check_bias, parse_chat, sampling_params
from serve.openai import ApiError, shown, unknown_model

if TYPE_CHECKING:
    from serve.engines.local import LocalEngine

DEFAULT_MAX_TOKENS = 16  # OpenAI's
REFUSED = ("suffix", "echo", "best_of")
STAND_IN = [{"role": "user", "content": ""}]
"""What the checks of a chat see in place of messages."""


class TextAnswer(ChatAnswer):
    """One completion of a text, whole or as a stream."""

    object_names = ("text_completion", "text_completion")

    def __init__(self, engine: "LocalEngine", document: Json) -> None:
        request = _as_chat(document, engine)
        prompt = _token_ids(document.get("prompt"), engine)
        try:
            engine.adapter(request.model)
        except NotFoundError:
            raise unknown_model(request.model, (m.name for m in engine.models())) from None
        self._engine, self.request, self._tools = engine, request, False
        check_bias(request, len(engine.tokenizer))
        self._offsets: dict[int, int] = {}
        try:
            self._params = sampling_params(request, len(prompt), engine.max_context_tokens, DEFAULT_MAX_TOKENS)
        except ApiError as error:
            error.param = "prompt"
            raise
        self._header = Header.of(request, f"cmpl-{uuid.uuid4().hex}", engine.fingerprint, prompt)

    def _choice(self, update: Update) -> Json:
        choice: Json = {
            "index": update.generation.index,
            "text": update.text,
            "logprobs": self._logprobs(update),
            "finish_reason": update.finish_reason,
        }
        if self._header.return_token_ids:
            choice["token_ids"] = update.token_ids
        return choice

    def _logprobs(self, update: Update) -> Json | None:
        if not self._params.logprobs:
            return None
        texts, index = self._engine.texts, update.generation.index
        tokens = [texts.get(token_id)[0] for token_id in update.token_ids]
        begin, offsets = self._offsets.get(index, 0), []
        for token in tokens:
            offsets.append(begin)
            begin += len(token)
        self._offsets[index] = begin
        return {
            "tokens": tokens,
            "token_logprobs": [known.logprob for known in update.logprobs],
            "top_logprobs": [{texts.get(i)[0]: value for i, value in known.top} for known in update.logprobs],
            "text_offset": offsets,
        }

    def _piece(self, update: Update, *, first: bool, held: dict[int, str]) -> Json:
        return {
            "index": update.generation.index,
            "text": update.text,
            "logprobs": self._logprobs(update),
            "finish_reason": update.finish_reason,
        }

    def _empty_piece(self) -> Json:
        return {"text": "", "logprobs": None, "finish_reason": None}


def _as_chat(document: Json, engine: "LocalEngine") -> ChatRequest:
    """The request with the fields of a chat, so that one set of rules checks both.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    for name in REFUSED:
        if document.get(name):
            raise ApiError(400, f"{name} is not supported by this engine", param=name, code="invalid_value")
    asked: Any = document.get("logprobs")
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 0):
        raise ApiError(400, f"logprobs={shown(asked)} must be a number", param="logprobs", code="invalid_value")
    names = {"messages": STAND_IN, "logprobs": asked is not None, "top_logprobs": asked or None, "tools": None}
    names |= dict.fromkeys(("tool_choice", "max_completion_tokens", "response_format"))
    return parse_chat(document | names, engine.settings)


def _token_ids(prompt: Any, engine: "LocalEngine") -> list[int]:
    """The prompt as the model reads it.

    Raises:
        ApiError: 400, it is neither one text nor one list of the model's token ids.
    """
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    known = len(engine.tokenizer)
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < known for i in ids):
        message = f"prompt={shown(prompt)} must be one text, or one list of token ids below {known}"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return ids
