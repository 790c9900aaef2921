"""What the engine that serves a version answers, token by token: asked through the running routers."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import openai

from cluster.errors import UnavailableError
from cluster.registry import Version
from cluster.settings import Settings
from train.evaluate.routed import routed
from train.evaluate.types import Prompt

log = logging.getLogger(__name__)


def engine_answers(
    settings: Settings, version: Version, prompts: Sequence[Prompt]
) -> tuple[list[list[int]], list[list[int]]] | None:
    """The ids of each prompt as the engine rendered it, and of its greedy answer; `None` where the check is to do
    without.

    Raises:
        InputError: an engine must be asked, and there is no key for the routers.
        UnavailableError: an engine must be asked, and it does not answer with ids.
    """
    chosen = settings.export
    if chosen.check_with == "here" or not prompts:
        return None
    if chosen.check_with == "auto" and not os.environ.get(settings.evaluation.router_key_env):
        return None
    asked = routed(settings, version)
    try:
        answers = [_ask(asked.client, version.id, prompt, chosen.check_tokens) for prompt in prompts]
    except (openai.OpenAIError, KeyError, TypeError) as error:
        reason = f"{version.id} cannot be asked through {asked.client.base_url} ({type(error).__name__}: {error})"
        if chosen.check_with == "engine":
            raise UnavailableError(f"{reason}; serve it, or set export.check_with to `here`") from None
        log.info("%s: base and adapter answer here instead", reason)
        return None
    return [rendered for rendered, _ in answers], [ids for _, ids in answers]


def _ask(client: openai.OpenAI, model: str, prompt: Prompt, max_tokens: int) -> tuple[list[int], list[int]]:
    request: dict[str, Any] = {"messages": list(prompt.messages), "temperature": 0, "max_tokens": max_tokens}
    if prompt.tools:
        request["tools"] = list(prompt.tools)
    reply = client.chat.completions.create(model=model, extra_body={"return_token_ids": True}, **request)
    return list((reply.model_extra or {})["prompt_token_ids"]), list((reply.choices[0].model_extra or {})["token_ids"])
