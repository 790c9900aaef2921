"""The engine and the trainer's own generation agree: same prompt ids, same greedy text, same log-probs."""

import asyncio
from pathlib import Path

import pytest

from cluster.settings.engines import EngineSettings
from serve.engines.generation import SamplingParams
from serve.engines.local import LocalEngine
from tests.serve.engines.models import build_adapter
from tests.toys import toy_examples
from train.generate import LocalModel, generate


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
