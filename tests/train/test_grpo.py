"""GRPO on the toy world: the grader's reward rises on prompts that were held out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from cluster.errors import DatasetError, HealthGateError, InputError
from train.config import TrainConfig
from train.loss import group_advantages
from train.run import train


@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_raises_the_grader_reward_on_held_out_prompts(seed: int, config_of: Callable[..., TrainConfig]) -> None:
    metrics = train(config_of("grpo", seed=seed, max_steps=25)).metrics
    assert metrics["heldout/reward"] > metrics["heldout/base_reward"] + 0.05
    assert 0 < metrics["heldout/kl_to_base"] < 1.0
    assert 0 < metrics["best_validation/reward"] <= 1


def test_stronger_kl_stays_nearer_to_the_base(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    near, far = (
        train(config_of("grpo", beta=beta, max_steps=8, out=tmp_path / str(beta))).metrics["heldout/kl_to_base"]
        for beta in (10.0, 1e-3)
    )
    assert near < far


def test_grader_that_gives_everybody_the_same_is_stopped(config_of: Callable[..., TrainConfig]) -> None:
    useless = {"type": "string_check", "reference": "never said", "operation": "eq"}
    with pytest.raises(HealthGateError, match="no advantage left: in 100% of the groups"):
        train(config_of("grpo", grader=useless, health={"window_steps": 3}))


def test_grader_that_abstains_is_stopped(config_of: Callable[..., TrainConfig]) -> None:
    blind = {"type": "string_check", "reference": "{{ item.nothing }}"}
    with pytest.raises(HealthGateError, match="the grader abstained on 100%"):
        train(config_of("grpo", grader=blind, health={"window_steps": 3}))


def test_wrong_graders_and_shapes_are_refused(config_of: Callable[..., TrainConfig]) -> None:
    with pytest.raises(InputError, match=r"training\.grpo\.grader\.type='oracle' must be one of"):
        train(config_of("grpo", grader={"type": "oracle"}))
    with pytest.raises(InputError, match="must be a multiple of `group_size`=8"):
        config_of("grpo", batch_size=20)
    with pytest.raises(DatasetError, match="prompts are too few: one step takes 200"):
        train(config_of("grpo", batch_size=1600))


def test_prompts_carry_what_a_grader_compares_with(toy_base: Path, toy_dataset: Path) -> None:
    from train.examples import Encoder, read_data
    from train.models import load_tokenizer

    tokenizer = load_tokenizer(str(toy_base))
    table = read_data(toy_dataset, "sft").train
    row, messages = Encoder(tokenizer, 256).prompts(table).rows[0], json.loads(table.to_pylist()[0]["messages"])
    item = json.loads(row["item"])
    assert (item["reference"], item["messages"]) == (messages[1]["content"], messages[:1])
    assert tokenizer.decode(json.loads(row["prompt"])).endswith("<|assistant|>")


def test_tasks_carry_their_own_fields_and_need_no_answer(toy_base: Path) -> None:
    from train.examples import Encoder
    from train.models import load_tokenizer

    asked = [{"role": "user", "content": "service=api level=low hour=3"}]
    row = {"example_id": "e1", "prompt": json.dumps(asked), "item": '{"answer": "ignore"}', "tools": None}
    tokenizer = load_tokenizer(str(toy_base))
    table = pa.Table.from_pylist([row, {**row, "prompt": json.dumps(asked * 50)}])
    encoded = Encoder(tokenizer, 256).prompts(table)
    assert json.loads(encoded.rows[0]["item"]) == {"example_id": "e1", "answer": "ignore", "messages": asked}
    assert tokenizer.decode(json.loads(encoded.rows[0]["prompt"])).endswith("<|assistant|>")
    assert (len(encoded.rows), encoded.dropped, encoded.truncated, encoded.lengths) == (1, 1, 1, [])


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.3, float("nan")]])
    spread = (0.5 / 3) ** 0.5 + 1e-4  # deviations .5, -.5, 0, 0; three degrees of freedom
    found = group_advantages(rewards)
    assert found[0].tolist() == pytest.approx([0.5 / spread, -0.5 / spread, 0, 0], abs=1e-6)
    assert found[1].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_advantages_equal_those_of_trl(config_of: Callable[..., TrainConfig]) -> None:
    """TRL samples and grades one batch; its advantages come out of the same rewards here."""
    from train.run import build_trainer, prepare

    seen: list[Any] = []
    trainer = build_trainer(prepare(config_of("grpo", temperature=1.5)), None)
    own = trainer._calculate_rewards

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(own(*arguments))
        return torch.as_tensor(seen[-1])

    trainer._calculate_rewards = watched
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert seen[0].std() > 0
    expected = group_advantages(seen[0][:, 0].view(-1, 8)).flatten()
    assert batch["advantages"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
