"""Agents' prompts and curation: taken off where events are joined, put back before examples are made.

In between, questions are compared, scrubbed and sorted by topic for what was asked: behind a long prompt that they
share, all of them would look alike.
"""

from collections.abc import Mapping
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from data.prompt import with_prompt, without_prompt

Prompts = Mapping[str, str]
"""Digest -> text."""


def take_off(body: dict[str, Any], prompts: Prompts) -> dict[str, Any]:
    """An interaction's body without the agent's prompt; it is named only where it was found and taken off."""
    text = prompts.get(body.get("prompt_digest") or "")
    bare = None if text is None else without_prompt(body["messages"], text)
    if bare is None:
        return {name: value for name, value in body.items() if name != "prompt_digest"}
    return body | {"messages": bare}


def put_back(table: pa.Table, prompts: Prompts) -> pa.Table:
    """Rows whose messages begin with the prompt that their answer was given behind."""
    if not prompts or not pc.any(pc.is_valid(table["prompt_digest"])).as_py():
        return table
    pairs = zip(table["messages"].to_pylist(), table["prompt_digest"].to_pylist(), strict=True)
    place = table.column_names.index("messages")
    messages = [text if digest is None else _prompted(text, prompts[digest]) for text, digest in pairs]
    return table.set_column(place, "messages", pa.array(messages, pa.string()))


def _prompted(messages: str, text: str) -> str:
    return orjson.dumps(with_prompt(orjson.loads(messages), text), option=orjson.OPT_SORT_KEYS).decode()
