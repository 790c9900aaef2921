"""Proof of an export: it is loaded, and its greedy answers are those of the engine that serves the version, token by
token; where none can be asked, those of base and adapter in this process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConflictError, NotFoundError
from cluster.registry import Version
from cluster.settings import Settings
from data.interaction_bodies import Message
from data.manifest import find_dataset
from data.template import render, template_digest
from train.evaluate.truth import read_truths
from train.evaluate.types import Prompt
from train.export.engine import engine_answers
from train.export.merge import with_adapter
from train.generate import Sampling, decode, end_tokens
from train.models import load_tokenizer
from train.quiet import quiet_libraries

PROBES: list[list[Message]] = [
    [{"role": "user", "content": text}]
    for text in ("Hello.", "naïve ✓ 😀", '{"a": [1, 2]}', "List three colours.", "What is 12 times 12?", "two\nlines")
]
"""What is asked where the version's dataset is not at hand."""


@dataclass(frozen=True)
class Agreement:
    """On how many prompts the exported weights answer with the same tokens."""

    identical: int
    prompts: int
    by_engine: bool = False
    """Held against an engine's answers."""

    @property
    def share(self) -> float:
        """1 where nothing was asked."""
        return self.identical / self.prompts if self.prompts else 1.0


@dataclass(frozen=True)
class Expected:
    """Prompts and what the version answers to them where it is served, as ids."""

    prompts: list[list[int]]
    answers: list[list[int]]
    max_new_tokens: int
    by_engine: bool = False
    """Said by an engine, and not by base and adapter here."""

    def compare(self, model: Any, ends: Sequence[int]) -> Agreement:
        """Ask an exported model the same."""
        answers = decode(model, self.prompts, ends, Sampling(self.max_new_tokens, batch_size=64))
        pairs = zip(answers, self.answers, strict=True)
        same = sum(_said(ours, ends) == _said(theirs, ends) for ours, theirs in pairs)
        return Agreement(same, len(self.prompts), self.by_engine)


def _said(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Without end tokens: engines differ in whether they tell them."""
    return [token for token in ids if token not in ends]


def expect(settings: Settings, version: Version, adapter: Path | None) -> Expected:
    """Greedy answers of the engine that serves the version, else of the base under its adapter, not merged."""
    chosen, tokenizer = settings.export, load_tokenizer(version.base_model)
    asked = _prompts(settings, version)
    told = engine_answers(settings, version, asked)
    if told is not None:
        return Expected(*told, chosen.check_tokens, by_engine=True)
    prompts = [render(tokenizer, p.messages, p.tools, add_generation_prompt=True) for p in asked]
    model, _ = with_adapter(version.base_model, adapter)
    answers = decode(model, prompts, end_tokens(model, tokenizer), Sampling(chosen.check_tokens, batch_size=64))
    return Expected(prompts, answers, chosen.check_tokens)


def check_template(folder: Path, version: Version) -> None:
    """Refuse an export that would render messages differently than training did.

    Raises:
        ConflictError: it would.
    """
    recorded = version.tags.get("template_digest")
    found = template_digest(load_tokenizer(str(folder)))
    if recorded is not None and found != recorded:
        raise ConflictError(
            f"{version.id} was trained with the chat template {recorded[:12]}, its base model has {found[:12]} now; "
            "bring the base's tokenizer back"
        )


def load_exported(folder: Path, gguf_file: str | None = None) -> Any:
    """A model directory, or a GGUF file read back into 32 bits by transformers."""
    quiet_libraries()
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": gguf_file} if gguf_file else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def _prompts(settings: Settings, version: Version) -> list[Prompt]:
    limit = settings.export.check_prompts
    if version.dataset_id is not None:
        try:
            truths = read_truths(find_dataset(settings, version.dataset_id), limit=limit)
        except NotFoundError:
            truths = []  # the dataset is elsewhere; the probes still tell
        if truths:
            return [truth.prompt for truth in truths]
    return [Prompt((*probe,)) for probe in PROBES[:limit]]
