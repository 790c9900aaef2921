"""A version whose weights are elsewhere, asked through the running routers like any client would."""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from cluster.errors import InputError, UnavailableError
from cluster.registry import Version
from cluster.settings import Settings
from train.evaluate.types import Logged, Prompt, Truth

UNKNOWN = (math.nan, 0)
"""What an endpoint tells of the likelihood of an answer that it did not give: nothing."""


class RoutedVersion:
    """Answers over HTTP; how likely it finds somebody else's answer cannot be asked."""

    def __init__(self, name: str, client: openai.OpenAI, max_new_tokens: int, concurrency: int) -> None:
        self.name, self.client = name, client
        self.max_new_tokens, self.concurrency = max_new_tokens, concurrency

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers, in order.

        Raises:
            UnavailableError: the routers do not answer, or refuse.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._answer, prompts))

    def losses(self, truths: Sequence[Truth]) -> list[tuple[float, int]]:
        """Unknown, for each."""
        return [UNKNOWN for _ in truths]

    def likelihoods(self, logged: Sequence[Logged]) -> list[tuple[float, int]]:
        """Unknown, for each."""
        return [UNKNOWN for _ in logged]

    def _answer(self, prompt: Prompt) -> str:
        asked: dict[str, Any] = {"messages": list(prompt.messages), "temperature": 0, "max_tokens": self.max_new_tokens}
        if prompt.tools:
            asked["tools"] = list(prompt.tools)
        try:
            reply = self.client.chat.completions.create(model=self.name, **asked)
        except openai.OpenAIError as error:
            raise UnavailableError(f"{self.name} does not answer through {self.client.base_url} ({error})") from None
        return answer_text(reply.choices[0].message)


def answer_text(message: Any) -> str:
    """The text of an answer; tool calls are written as the tool-call scorer reads them."""
    calls = [call.function for call in message.tool_calls or []]
    return (message.content or "") + "".join(call_text(call.name, call.arguments) for call in calls)


def call_text(name: str, arguments: str) -> str:
    """One call in the form Hermes and Qwen models write."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def routed(settings: Settings, version: Version) -> RoutedVersion:
    """A version behind the routers of the settings.

    Raises:
        InputError: there is no key in the environment.
    """
    chosen, serve = settings.evaluation, settings.serve
    key = os.environ.get(chosen.router_key_env)
    if not key:
        rule = f"must hold a key for the routers: the weights of {version.id} are at {version.endpoint}"
        raise InputError(chosen.router_key_env, key, rule, "set the environment variable (`rayloop keys create`)")
    url = chosen.router_url or f"http://{serve.host}:{serve.port}"
    client = openai.OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=key, timeout=chosen.router_timeout_s)
    return RoutedVersion(version.id, client, chosen.max_new_tokens, chosen.router_concurrency)
