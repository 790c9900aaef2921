"""The embedded engine against transformers and peft themselves."""

import asyncio
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cluster.errors import ConfigError
from cluster.settings.engines import EngineSettings
from serve.engines.generation import SamplingParams, Update
from serve.engines.local import LocalEngine

PROMPTS = [[5, 9, 40], list(range(10, 70)), [7] * 17, [100, 3, 8, 9, 4, 77, 12], list(range(200, 233))]


async def finals(engine: LocalEngine, model: str, prompt: list[int], **params: object) -> Update:
    """The single final update of one answer."""
    updates = [u async for u in engine.generate(model, prompt, SamplingParams(**params))]  # type: ignore[arg-type]
    assert len(updates) == 1
    return updates[0]


def reference(base: Path, adapter: Path | None, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probs of an answer's tokens by one plain forward pass of transformers or peft."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1).tolist()


def test_mixed_adapters_equal_single_adapter_forward(
    engine: LocalEngine, base: Path, adapters: dict[str, Path]
) -> None:
    names = ["base", "red", "blue"]

    async def all_at_once() -> list[Update]:
        jobs = [finals(engine, names[i % 3], PROMPTS[i % 5], max_tokens=20, seed=i, logprobs=True) for i in range(30)]
        return await asyncio.gather(*jobs)

    for i, update in enumerate(asyncio.run(all_at_once())):
        name = names[i % 3]
        expected = reference(base, adapters.get(name), PROMPTS[i % 5], update.token_ids)
        assert [p.logprob for p in update.logprobs] == pytest.approx(expected, abs=1e-4), (i, name)


def test_greedy_answers_equal_generate_of_transformers(engine: LocalEngine, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()

    async def all_at_once() -> list[Update]:
        return await asyncio.gather(*[finals(engine, "base", p, max_tokens=24, temperature=0.0) for p in PROMPTS])

    for prompt, update in zip(PROMPTS, asyncio.run(all_at_once()), strict=True):
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        assert update.token_ids == expected


def test_seeded_answer_does_not_depend_on_its_batch(engine: LocalEngine) -> None:
    async def alone() -> list[int]:
        return (await finals(engine, "red", PROMPTS[1], max_tokens=20, seed=11)).token_ids

    async def in_company() -> list[int]:
        others = [finals(engine, "blue", PROMPTS[i % 5], max_tokens=5 + i) for i in range(12)]
        answers = await asyncio.gather(finals(engine, "red", PROMPTS[1], max_tokens=20, seed=11), *others)
        return answers[0].token_ids

    assert asyncio.run(alone()) == asyncio.run(in_company())


def test_shared_prompt_beginnings_are_reused_without_changing_answers(engine: LocalEngine) -> None:
    prefix = list(range(30, 70))
    prefixes = engine.scheduler.prefixes

    async def ask(tail: int, model: str) -> Update:
        return await finals(engine, model, [*prefix, tail], max_tokens=8, temperature=0.0, logprobs=True)

    first = [asyncio.run(ask(5, model)) for model in ("red", "base")]
    asyncio.run(ask(6, "red"))
    asyncio.run(ask(6, "base"))
    hits = prefixes.hit_tokens
    again = [asyncio.run(ask(5, model)) for model in ("red", "base")]
    assert prefixes.hit_tokens - hits == 2 * 40
    for before, after in zip(first, again, strict=True):
        assert before.token_ids == after.token_ids
        expected = [p.logprob for p in before.logprobs]
        assert [p.logprob for p in after.logprobs] == pytest.approx(expected, abs=1e-4)
    assert first[0].token_ids != first[1].token_ids


def test_stopping_early_frees_the_row(engine: LocalEngine) -> None:
    async def leave_early() -> None:
        generator = engine.generate("base", PROMPTS[0], SamplingParams(max_tokens=400, ignore_eos=True), stream=True)
        await anext(generator)
        await generator.aclose()  # type: ignore[attr-defined]
        for _ in range(200):
            if engine.scheduler.running == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the row is still in the batch")

    asyncio.run(leave_early())


def test_a_failing_step_ends_its_answers_and_the_engine_goes_on(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.scheduler, "_model", broken)
        update = asyncio.run(finals(engine, "base", PROMPTS[0], max_tokens=4))
        assert update.finish_reason == "error"
    assert asyncio.run(finals(engine, "base", PROMPTS[0], max_tokens=4)).finish_reason in ("stop", "length")


def test_not_finite_adapter_weights_in_memory_reach_no_other_row(
    engine: LocalEngine, make_adapter, tmp_path: Path
) -> None:
    engine.load_adapter("poisoned", make_adapter(tmp_path / "poisoned", seed=3))
    healthy = asyncio.run(finals(engine, "red", PROMPTS[1], max_tokens=12, temperature=0.0))
    for pair in engine.adapter("poisoned").pairs.values():  # type: ignore[union-attr]
        pair.a.fill_(1e38)

    async def together() -> list[Update]:
        jobs = [finals(engine, "poisoned", PROMPTS[i], max_tokens=12) for i in range(4)]
        return await asyncio.gather(finals(engine, "red", PROMPTS[1], max_tokens=12, temperature=0.0), *jobs)

    answers = asyncio.run(together())
    assert answers[0].token_ids == healthy.token_ids
    assert {a.finish_reason for a in answers[1:]} == {"error"}
    again = asyncio.run(finals(engine, "red", PROMPTS[1], max_tokens=12, temperature=0.0))
    assert again.token_ids == healthy.token_ids
    engine.unload_adapter("poisoned")


def test_answers_in_the_making_survive_an_unload(engine: LocalEngine, make_adapter, tmp_path: Path) -> None:
    engine.load_adapter("brief", make_adapter(tmp_path / "brief", seed=4))

    async def unload_midway() -> int:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        generator = engine.generate("brief", PROMPTS[0], params, stream=True)
        tokens = len((await anext(generator)).token_ids)
        engine.unload_adapter("brief")
        async for update in generator:
            assert update.error is None
            tokens += len(update.token_ids)
        return tokens

    assert asyncio.run(unload_midway()) == 60
    assert "brief" not in [m.name for m in engine.models()]


def test_missing_base_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.base_model=None is not set"):
        LocalEngine(EngineSettings())
    with pytest.raises(ConfigError, match=r"engine\.base_model=.* cannot be loaded"):
        LocalEngine(EngineSettings(base_model=str(tmp_path / "nothing")))
