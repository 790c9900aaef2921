"""The engine and the trainer's own generation agree: same prompt ids, same greedy text, same log-probs."""

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest

from cluster.settings.engines import EngineSettings
from data.template import render, template_digest
from serve.engines.generation import SamplingParams
from serve.engines.local import LocalEngine
from tests.serve.engines.models import build_adapter
from tests.toys import toy_examples
from train.examples import IGNORED, Encoder
from train.export.merge import write_merged
from train.generate import LocalModel, generate
from train.models import load_tokenizer


def test_engine_and_training_agree_on_the_toy_model(toy_base: Path, tmp_path: Path) -> None:
    adapter = build_adapter(toy_base, tmp_path / "adapter", seed=5)
    chats = toy_examples(12, seed=77)
    prompts = [chat[:-1] for chat in chats]
    engine = LocalEngine(EngineSettings(base_model=str(toy_base)))
    engine.load_adapter("random", adapter)

    async def ask(number: int, model: str) -> tuple[str, list[int], list[float]]:
        params = SamplingParams(max_tokens=32, temperature=0.0, logprobs=True)
        updates = [u async for u in engine.generate(model, engine.render(prompts[number]), params)]
        return updates[0].text, updates[0].token_ids, [p.logprob for p in updates[0].logprobs]

    async def everyone() -> list[tuple[str, list[int], list[float]]]:
        return await asyncio.gather(*[ask(i, model) for model in ("base", "random") for i in range(12)])

    answers = asyncio.run(everyone())
    engine.close()
    for folder, part in ((None, answers[:12]), (adapter, answers[12:])):
        assert [text for text, _, _ in part] == generate(toy_base, folder, prompts, max_new_tokens=32)
    scored = LocalModel(toy_base).logprobs(prompts, [text for text, _, _ in answers[:12]])
    alike = [
        (known.total, sum(values))
        for known, (_, ids, values) in zip(scored, answers[:12], strict=True)
        if known.tokens == len(ids)
    ]
    assert len(alike) >= 6  # the others wrote their text in other tokens than the tokenizer would
    for known, seen in alike:
        assert seen == pytest.approx(known, abs=1e-3)


WORDS = (
    "ok",
    "naïve café",
    "日本語 テスト",
    "😀👍🏽",
    "tab\tand\nline",
    "<|end|>",
    "",
    "  spaced  ",
    '{"a": "b"}',
    "ß ŉ ﬁ",
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"q": {}}}}}
    for name in ("search", "buscar_über")
]


def conversation(random: Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Up to seven turns that end with an assistant's: tools, unicode, empty turns, contents of every form."""
    chat: list[dict[str, Any]] = []
    if random.random() < 0.4:
        chat.append({"role": "system", "content": random.choice(WORDS)})
    for _ in range(random.randint(1, 3)):
        chat.append({"role": "user", "content": content(random)})
        if random.random() < 0.4:
            arguments = {"q": random.choice(WORDS)}
            shown = json.dumps(arguments, ensure_ascii=random.random() < 0.5) if random.random() < 0.7 else arguments
            call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": shown}}
            chat.append({"role": "assistant", "content": random.choice([None, ""]), "tool_calls": [call]})
            chat.append({"role": "tool", "tool_call_id": "c1", "content": random.choice(WORDS)})
        chat.append({"role": "assistant", "content": random.choice([*WORDS, None])})
    return chat, random.choice([None, TOOLS[:1], TOOLS])


def content(random: Random) -> Any:
    text = random.choice(WORDS)
    parts = [{"type": "text", "text": text}, {"type": "text", "text": random.choice(WORDS)}]
    return random.choice([text, parts, None])


def test_trainer_engine_and_export_make_the_same_ids_of_500_conversations(toy_base: Path, tmp_path: Path) -> None:
    write_merged(tmp_path / "export", str(toy_base), None)
    exported, trained = load_tokenizer(str(tmp_path / "export")), load_tokenizer(str(toy_base))
    engine = LocalEngine(EngineSettings(base_model=str(toy_base)))
    encoder, random, seen = Encoder(trained, 100_000), Random(0), set()
    for number in range(500):
        chat, tools = conversation(random)
        row = {"example_id": str(number), "messages": json.dumps(chat), "tools": json.dumps(tools) if tools else None}
        (ids,) = encoder.sft(pa.Table.from_pylist([row])).rows
        prompt = engine.render(chat[:-1], tools)
        learned = [label for label in ids["labels"] if label != IGNORED]
        assert ids["input_ids"] == prompt + learned
        assert ids["input_ids"] == render(exported, chat, tools)
        assert prompt == render(exported, chat[:-1], tools, add_generation_prompt=True)
        seen.add(tuple(prompt))
    engine.close()
    assert len(seen) > 450
    assert template_digest(exported) == template_digest(trained) == engine.template_digest
