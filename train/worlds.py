"""What answers an agent's tool calls while it learns: a recording, stubs, or a tool server.

A recording knows what came back when this call was made; it does not know what would have come back from
another. Such a call, and a server that does not answer, fail the episode: it earns no reward rather than a wrong
one. A call to a tool that does not exist is the agent's own mistake, and it is told so.
"""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Protocol

from cluster.errors import InputError, UnavailableError
from cluster.settings.training import ToolWorldSettings
from data.tool_calls import ToolCall


class WorldFailedError(Exception):
    """The environment cannot say what the tool would have answered."""


class World(Protocol):
    """Answers the calls of one task."""

    def answer(self, call: ToolCall) -> str:
        """The tool's result as text.

        Raises:
            WorldFailedError: nobody knows.
        """
        ...


class Recorded:
    """Results as they were recorded, of calls with the same arguments; the same call again goes on through them."""

    def __init__(self, tools: Sequence[str], results: Sequence[tuple[ToolCall, str]]) -> None:
        self.tools = set(tools) | {call.name for call, _ in results}
        self.results: dict[str, list[str]] = {}
        for call, result in results:
            self.results.setdefault(call.key, []).append(result)
        self.asked: dict[str, int] = {}

    def answer(self, call: ToolCall) -> str:
        """What was recorded; the last result stands for further calls."""
        if call.name not in self.tools:
            return unknown_tool(call.name)
        results = self.results.get(call.key)
        if not results:
            raise WorldFailedError(f"no recording of {call.key}")
        place = self.asked.get(call.key, 0)
        self.asked[call.key] = place + 1
        return results[min(place, len(results) - 1)]


class Stubs:
    """The same text from a tool, whatever it is asked."""

    def __init__(self, replies: Mapping[str, str]) -> None:
        self.replies = replies

    def answer(self, call: ToolCall) -> str:
        """The tool's stub."""
        return self.replies.get(call.name) or unknown_tool(call.name)


class ToolServer:
    """A tool server over HTTP, `POST /v1/tools/{name}`."""

    def __init__(self, url: str, key: str, timeout_s: float) -> None:
        self.url, self.key, self.timeout_s = url.rstrip("/"), key, timeout_s

    def answer(self, call: ToolCall) -> str:
        """The result as JSON text; what the server refuses is an answer as well, one that does not answer is not."""
        request = urllib.request.Request(
            f"{self.url}/v1/tools/{urllib.parse.quote(call.name, safe='')}",
            json.dumps({"arguments": call.arguments}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                return json.dumps(json.load(reply)["result"])
        except urllib.error.HTTPError as error:
            if error.code in (400, 404, 422):
                return json.dumps({"error": error.read(2000).decode(errors="replace")})
            raise WorldFailedError(f"the tool server answered {error.code}") from None
        except (OSError, ValueError, KeyError) as error:
            raise WorldFailedError(f"the tool server does not answer ({error})") from None


def unknown_tool(name: str) -> str:
    """What an agent is told that calls a tool there is not."""
    return json.dumps({"error": f"there is no tool {name}"})


def open_world(settings: ToolWorldSettings, tools: Sequence[str], results: Sequence[tuple[ToolCall, str]]) -> World:
    """A world for one episode."""
    if settings.answers == "stubs":
        return Stubs(settings.stubs)
    if settings.answers == "server":
        return ToolServer(str(settings.url), os.environ.get(settings.api_key_env, ""), settings.timeout_s)
    return Recorded(tools, results)


def check_world(settings: ToolWorldSettings) -> None:
    """Refuse a tool server that is not there, before a training starts.

    Raises:
        InputError: no key in the environment.
        UnavailableError: nobody answers at the address, or not as a tool server.
    """
    if settings.answers != "server":
        return
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise InputError(settings.api_key_env, key, "is not set", "put a key of scope `tools` into the environment")
    request = urllib.request.Request(f"{str(settings.url).rstrip('/')}/v1/tools")
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=settings.timeout_s) as reply:
            json.load(reply)["data"]
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(f"the tool server at {settings.url} does not answer ({error})") from None
