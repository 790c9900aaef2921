"""Answers that keep to a JSON schema, alone or as a tool call: at every step only tokens that can still lead to one.

llguidance (Rust, https://github.com/guidance-ai/llguidance) turns a schema into a grammar and says which tokens may
come next; documents are written without blanks between their tokens, or a small model may write them for ever.
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import InputError
from serve.engines.generation import SamplingParams

COMPACT = {"whitespace_flexible": False}
Schema = Mapping[str, Any]


class Grammars:
    """Makes constraints for one tokenizer. Thread-safe; llguidance is loaded at the first schema."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos_ids = tokenizer, vocabulary, sorted(eos_ids)
        self._known: Any = None
        self._making = threading.Lock()

    def constraint(self, params: SamplingParams) -> "Constraint | None":
        """A fresh constraint for one answer; `None` where it may be anything.

        Raises:
            InputError: the schema is none, or uses what cannot be kept to.
        """
        if params.call_schema is not None:
            return self._made(params.call_schema, "tools", _grammar_of_call)
        return None if params.json_schema is None else self._made(params.json_schema, "response_format", _grammar)

    def _made(self, schema: Schema, field: str, grammar_of: Callable[[Schema], str]) -> "Constraint":
        from llguidance import LLMatcher

        try:
            grammar = grammar_of(schema)
            problem = LLMatcher.validate_grammar(grammar, self._tokens())
        except (ValueError, TypeError) as error:
            problem = str(error)
        if problem:
            cause = problem.strip().splitlines()[0]
            raise InputError(field, schema, f"cannot be kept to ({cause})", "mend the schema")
        return Constraint(LLMatcher(self._tokens(), grammar), self._vocabulary)

    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._making:
            if self._known is None:
                self._known = from_tokenizer(self._tokenizer, self._vocabulary, self._eos_ids)
            return self._known


def _grammar(schema: Schema) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=COMPACT))


def _grammar_of_call(schema: Schema) -> str:
    """The document between the tags that `data.tool_calls` looks for."""
    from llguidance import LLMatcher

    call = json.dumps({**schema, "x-guidance": COMPACT})
    lark = f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {call}'
    return str(LLMatcher.grammar_from_lark(lark))


class Constraint:
    """What one answer may go on with. Owned by the step loop."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        from llguidance.numpy import allocate_token_bitmask

        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = allocate_token_bitmask(1, vocabulary)

    def forbidden(self) -> Tensor:
        """True for every token that must not come next, bool [V]."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits, 0)
        allowed = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little", count=self._vocabulary)
        return torch.from_numpy(allowed == 0)

    def accept(self, token: int) -> None:
        """The token that came."""
        self._matcher.consume_token(token)
