import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.errors import InputError
from data.template import render_pair
from tests.toys import toy_examples
from train.config import TrainConfig
from train.generate import LocalModel, Sampling, decode, end_tokens, generate, score
from train.run import train


@pytest.fixture(scope="module")
def model(toy_base: Path) -> LocalModel:
    return LocalModel(toy_base, threads=1)


def test_batches_give_what_one_at_a_time_gives(model: LocalModel) -> None:
    prompts = [example[:1] for example in toy_examples(20, seed=5)]
    prompts[3] = [{"role": "user", "content": "x " * 30}]
    together = model.generate(prompts, Sampling(40, batch_size=7))
    alone = [model.generate([prompt], Sampling(40))[0] for prompt in prompts]
    assert [a.text for a in together] == [a.text for a in alone]


def test_greedy_answers_equal_those_of_transformers(model: LocalModel) -> None:
    ids, _ = render_pair(model.tokenizer, *_pair(model))
    theirs = model.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    (ours,) = decode(model.model, [ids], end_tokens(model.model, model.tokenizer), Sampling(40))
    assert ours == theirs


def test_same_seed_same_samples(model: LocalModel) -> None:
    prompts = [example[:1] for example in toy_examples(6, seed=5)]
    sampled = [model.generate(prompts, Sampling(30, 1.5, seed), num_samples=4) for seed in (1, 1, 2)]
    assert len(sampled[0]) == 24
    assert sampled[0] == sampled[1] != sampled[2]


def test_cut_answers_say_so(model: LocalModel) -> None:
    (answer,) = model.generate([toy_examples(1)[0][:1]], Sampling(3))
    assert not answer.finished and len(answer.token_ids) == 3


def test_logprobs_equal_a_plain_forward_pass(model: LocalModel) -> None:
    examples = toy_examples(9, seed=6)
    scored = model.logprobs([e[:1] for e in examples], [e[1]["content"] for e in examples], batch_size=4)
    for example, ours in zip(examples, scored, strict=True):
        prompt, answer = render_pair(model.tokenizer, example[:1], example[1:])
        with torch.inference_mode():
            logits_TV = model.model(torch.tensor([prompt + answer])).logits[0, :-1]
        logps_T = torch.log_softmax(logits_TV, -1)[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]
        assert ours.tokens == len(answer)
        assert ours.total == pytest.approx(float(logps_T.sum()), abs=1e-4)
        assert ours.per_token == pytest.approx(ours.total / len(answer))
        assert math.exp(ours.per_token) <= 1


def test_adapter_is_merged_without_changing_what_it_says(config_of: Callable[..., TrainConfig]) -> None:
    config = config_of("sft", max_steps=6)
    result = train(config)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.base_model), result.adapter_dir)
    merged = LocalModel(config.base_model, result.adapter_dir, threads=1)
    pairs = [render_pair(merged.tokenizer, e[:1], e[1:]) for e in toy_examples(4, seed=8)]
    for ours, theirs in zip(score(merged.model, pairs), score(plain.eval(), pairs), strict=True):
        assert ours.total == pytest.approx(theirs.total, abs=1e-3)
    base = LocalModel(config.base_model, threads=1)
    assert abs(score(base.model, pairs)[0].total - score(merged.model, pairs)[0].total) > 1e-3


def test_missing_model_and_adapter_are_one_clear_line(toy_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        generate(tmp_path / "nowhere", None, [])
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        generate(toy_base, tmp_path, [])


def _pair(model: LocalModel) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    example = toy_examples(1, seed=4)[0]
    return example[:1], example[1:]
