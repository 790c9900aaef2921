"""The one way messages become token ids: training, engine and evaluation all call `render`.

Two renderings of one conversation that differ in a single token make a model look worse than it is, and
nothing fails. So messages are brought to one form first (`normalise`), the template is always the
tokenizer's own, and `check_parity` compares with what an engine really fed its model.

The tokenizer is any `transformers` tokenizer with a chat template; nothing heavy is imported here.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cluster.errors import DatasetError
from data.interaction_bodies import Message

Tools = Sequence[dict[str, Any]] | None
PROBE: list[Message] = [
    {"role": "user", "content": "naïve ✓ 0123456789\n\n\ttabs  and spaces"},
    {"role": "assistant", "content": '{"a": [1, 2.5, null], "b": "c"}'},
    {"role": "user", "content": "again"},
]
"""A conversation whose ids stand for the whole tokenizer in `template_digest`."""


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Tools = None, *, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation under the tokenizer's own chat template.

    Args:
        add_generation_prompt: end with the start of an assistant turn, as an engine does.

    Raises:
        DatasetError: the template refuses the conversation, or there is no template.
    """
    try:
        ids = tokenizer.apply_chat_template(
            normalise(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # templates raise whatever Jinja or their authors chose
        raise DatasetError(f"the chat template refuses this conversation: {error}") from error
    return [int(token) for token in ids]


def render_pair(
    tokenizer: Any, prompt: Sequence[Message], completion: Sequence[Message], tools: Tools = None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt as an engine sees it, and of the completion that follows it.

    Raises:
        DatasetError: the template writes the prompt differently once an answer follows, so that no
            split into prompt and completion exists.
    """
    prompt_ids = render(tokenizer, prompt, tools, add_generation_prompt=True)
    all_ids = render(tokenizer, [*prompt, *completion], tools)
    if all_ids[: len(prompt_ids)] != prompt_ids:
        raise DatasetError("the chat template rewrites the prompt when an answer follows; use one that only appends")
    return prompt_ids, all_ids[len(prompt_ids) :]


def render_with_mask(tokenizer: Any, messages: Sequence[Message], tools: Tools = None) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and a mask that is 1 where an assistant speaks.

    The mask comes from the template's `{% generation %}` markers where it has them, else from rendering
    each assistant turn with and without its answer.

    Raises:
        DatasetError: no markers, and the template does not only append.
    """
    if has_generation_markers(tokenizer):
        return _mask_from_markers(tokenizer, messages, tools)
    ids = render(tokenizer, messages, tools)
    mask = [0] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt_ids, completion_ids = render_pair(tokenizer, messages[:index], [message], tools)
        end = len(prompt_ids) + len(completion_ids)
        if ids[:end] != prompt_ids + completion_ids:
            raise DatasetError("the chat template rewrites earlier turns; add generation markers to it")
        mask[len(prompt_ids) : end] = [1] * len(completion_ids)
    return ids, mask


def _mask_from_markers(tokenizer: Any, messages: Sequence[Message], tools: Tools) -> tuple[list[int], list[int]]:
    rendered = tokenizer.apply_chat_template(
        normalise(messages),
        tools=list(tools) if tools else None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return [int(token) for token in rendered["input_ids"]], [int(bit) for bit in rendered["assistant_masks"]]


def has_generation_markers(tokenizer: Any) -> bool:
    """True when the template marks what the assistant says."""
    template = tokenizer.get_chat_template()
    return "{% generation" in template or "{%- generation" in template


def normalise(messages: Sequence[Message]) -> list[Message]:
    """Messages in the one form that templates see.

    Content parts become text, missing content becomes empty, and the arguments of tool calls become
    objects (OpenAI sends them as JSON text, templates write them with `tojson`). Null fields go.
    """
    return [_normalise_message(message) for message in messages]


def _normalise_message(message: Message) -> Message:
    plain = {key: value for key, value in message.items() if value is not None and key != "content"}
    plain["content"] = content_text(message)
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_normalise_call(call) for call in plain["tool_calls"]]
    return plain


def content_text(message: Message) -> str:
    """The text of a message, whether it was sent as text, as parts, or not at all."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if is_text(part)) if isinstance(content, list) else ""


def is_text(part: Any) -> bool:
    """Whether a part of a message's content is text; others (images, sounds) have none."""
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _normalise_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", {}))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids: template, special tokens, vocabulary size, and a probe's ids."""
    parts = {
        "template": tokenizer.get_chat_template(),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "vocabulary": len(tokenizer),
        "probe": render(tokenizer, PROBE, add_generation_prompt=True),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_parity(
    tokenizer: Any, messages: Sequence[Message], prompt_token_ids: Sequence[int], tools: Tools = None
) -> None:
    """Compare our rendering of a prompt with the ids an engine recorded.

    Raises:
        DatasetError: they differ; the message names the first position.
    """
    ours = render(tokenizer, messages, tools, add_generation_prompt=True)
    theirs = list(prompt_token_ids)
    if ours == theirs:
        return
    shared = min(len(ours), len(theirs))
    at = next((i for i in range(shared) if ours[i] != theirs[i]), shared)
    raise DatasetError(
        f"the engine rendered this prompt differently: {len(ours)} tokens here, {len(theirs)} there, "
        f"first difference at token {at} "
        f"(here {_show(tokenizer, ours, at)}, there {_show(tokenizer, theirs, at)})"
    )


def _show(tokenizer: Any, ids: Sequence[int], at: int) -> str:
    return repr(tokenizer.decode(list(ids[at : at + 4])))
