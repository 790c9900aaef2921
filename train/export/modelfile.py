"""An Ollama Modelfile whose template writes what the training template wrote.

Ollama has templates of its own. Most chat templates put the same text before and after every message of
a role; those texts are found by rendering, written as a Go template, and compared with the training
template on conversations of many shapes. A template that does more is refused, not approximated. Tools
are not part of it: each model family writes them differently.
"""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import DatasetError, InputError
from data.interaction_bodies import Message
from data.template import render

log = logging.getLogger(__name__)

MARK = "⟦content⟧"
ROLES = ("system", "user", "assistant")
CONTENTS = ("hello", "naïve ✓ 😀", '{"a": [1, 2]}', "two\nlines", "")


@dataclass(frozen=True)
class RoleTemplate:
    """The text around every message of a role, and before and after all of them."""

    start: str
    around: dict[str, tuple[str, str]]
    generation: str
    """What starts the assistant's answer."""

    def text(self, messages: Sequence[Message]) -> str:
        """What Ollama's template makes of a conversation that waits for an answer."""
        written = "".join(f"{self.around[m['role']][0]}{m['content']}{self.around[m['role']][1]}" for m in messages)
        return f"{self.start}{written}{self.generation}"

    def go(self) -> str:
        """The same as a Go template."""
        parts = [f"{_go_text(self.start)}{{{{- range .Messages }}}}"]
        for index, (role, (before, after)) in enumerate(self.around.items()):
            condition = "if" if index == 0 else "else if"
            parts.append(f'{{{{- {condition} eq .Role "{role}" }}}}')
            parts.append(f"{_go_text(before)}{{{{ .Content }}}}{_go_text(after)}")
        return "".join([*parts, "{{- end }}{{- end }}", _go_text(self.generation)])


def role_template(tokenizer: Any) -> RoleTemplate:
    """The role texts of a tokenizer's chat template, proven on conversations of many shapes.

    Raises:
        InputError: the template depends on more than the role of each message.
    """
    found = _read_roles(tokenizer)
    for messages in conversations(found.around):
        if found.text(messages) != _rendered(tokenizer, messages, generation=True):
            raise InputError("to", "ollama", "cannot express this model's chat template", "export it as gguf or merged")
    return _without_added_start(tokenizer, found)


def conversations(roles: Any) -> list[list[Message]]:
    """Conversations of up to five turns, with and without a system message, of texts that need escaping."""
    found: list[list[Message]] = []
    for turns, first in itertools.product((1, 3, 5), CONTENTS):
        spoken = itertools.cycle(CONTENTS[CONTENTS.index(first) :] + CONTENTS[: CONTENTS.index(first)])
        chat = [{"role": ("user", "assistant")[n % 2], "content": next(spoken)} for n in range(turns)]
        found.append(chat)
        if "system" in roles:
            found.append([{"role": "system", "content": "You are brief."}, *chat])
    return found


def modelfile(
    source: str,
    template: RoleTemplate,
    stops: Sequence[str],
    *,
    temperature: float,
    top_p: float,
    name: str,
    adapter: str | None = None,
    system: str = "",
) -> str:
    """The text of a Modelfile; with `adapter`, the folder of one on top of `source`.

    Raises:
        InputError: `system`, the agent's prompt, cannot be written in one.
    """
    if '"""' in system:
        raise InputError("to", "ollama", "cannot write a prompt that holds three quotes", "take them out of the prompt")
    lines = [f"# {name}", f"FROM {source}", *([f"ADAPTER {adapter}"] if adapter else [])]
    lines += [f'TEMPLATE """{template.go()}"""', *([f'SYSTEM """{system}"""'] if system else [])]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER temperature {temperature:g}", f"PARAMETER top_p {top_p:g}"]
    return "\n".join(lines) + "\n"


def _read_roles(tokenizer: Any) -> RoleTemplate:
    """Texts of each role, from the gaps between the contents of a rendered conversation."""
    user, assistant = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
    whole = _rendered(tokenizer, [user, assistant, user])
    first, between, again, last = _gaps(whole, 4)
    before = _common_end(first, again)
    start = first.removesuffix(before)
    around = {
        "user": (before, last),
        "assistant": (between.removeprefix(last), again.removesuffix(before)),
    }
    generation = _rendered(tokenizer, [user], generation=True).removeprefix(_rendered(tokenizer, [user]))
    try:
        opening, after, _ = _gaps(_rendered(tokenizer, [{"role": "system", "content": MARK}, user]), 3)
        around["system"] = (opening.removeprefix(start), after.removesuffix(before))
    except DatasetError:
        log.info("the chat template knows no system message")
    return RoleTemplate(start, {role: around[role] for role in ROLES if role in around}, generation)


def _gaps(text: str, number: int) -> list[str]:
    """The texts around the contents.

    Raises:
        InputError: a content is missing or changed.
    """
    found = text.split(MARK)
    if len(found) != number:
        raise InputError("to", "ollama", "cannot express this model's chat template", "export it as gguf or merged")
    return found


def _common_end(left: str, right: str) -> str:
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return left[len(left) - length :]


def _rendered(tokenizer: Any, messages: Sequence[Message], *, generation: bool = False) -> str:
    text: str = tokenizer.decode(render(tokenizer, messages, add_generation_prompt=generation))
    return text


def _without_added_start(tokenizer: Any, found: RoleTemplate) -> RoleTemplate:
    """Leave the begin token out where the tokenizer puts it in front of every text by itself."""
    begin = tokenizer.bos_token
    adds = begin is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return RoleTemplate(found.start.removeprefix(begin), found.around, found.generation) if adds else found


def _go_text(text: str) -> str:
    """Literal text in a Go template; white space at its edges would be trimmed by `{{-`."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
