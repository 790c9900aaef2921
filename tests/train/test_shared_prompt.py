"""DPO that reads a prompt once, held against TRL's trainer on the same batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from cluster.errors import InputError
from tests.toys import toy_feedback, write_dataset
from train.config import TrainConfig
from train.run import build_trainer, prepare
from train.shared_prompt import ByLength, SharedPrompt, share_prompts
from train.trainers import DpoTrainer, row_lengths

LOGP, GRADIENT = 1e-4, 1e-5
"""Allowed differences: nats a sequence, and of each gradient against the largest of its tensor."""


def trainer_of(config_of: Callable[..., TrainConfig], **more: Any) -> Any:
    """A trainer whose adapter has moved away from its start."""
    config = config_of("dpo", **{"precision": "fp32", "sft_weight": 0.7, "beta": 0.3, "reference_cache": None, **more})
    trainer = build_trainer(prepare(config), None)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(trainer.model.named_parameters()):
        if "lora_B" in name or config.weights == "full":
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    return trainer


def measured(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, list[float]]]:
    """Loss, gradients and logged metrics of one batch."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, dict(trainer._metrics["train"])


def logps(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Policy log-probability of every answer, float [2B]."""
    model = SharedPrompt(trainer.model, trainer.attention) if trainer.shared_prompt else trainer.model
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        found = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
    return torch.as_tensor(found.log_probs.sum(1))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_same_logps_loss_and_gradients_as_trl(weights: str, config_of: Callable[..., TrainConfig]) -> None:
    apart, shared = (trainer_of(config_of, weights=weights, epochs=2, shared_prompt=on) for on in (False, True))
    assert apart.train_dataset["ref_chosen_logps"][:] == pytest.approx(
        shared.train_dataset["ref_chosen_logps"][:], abs=LOGP
    )
    batch = next(iter(apart.get_train_dataloader()))
    assert torch.allclose(logps(apart, batch), logps(shared, batch), atol=LOGP)
    theirs, ours = measured(apart, batch), measured(shared, batch)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 10
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max() <= GRADIENT * gradient.abs().max().clamp(min=1e-3), name
    for name, values in theirs[2].items():
        assert ours[2][name] == pytest.approx(values, abs=1e-3), name


def test_rows_hold_prompt_chosen_and_rejected_once() -> None:
    # prompts of 3 and 1 tokens; answers of 2 and 3, of 2 and 1; 0 is padding
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [9, 6, 7, 0, 0, 0], [1, 2, 3, 11, 12, 13], [9, 14, 0, 0, 0, 0]])
    attention, labels = (ids > 0).long(), ids.masked_fill((ids <= 3) | (ids == 9), -100)
    shared = share_prompts(ids, attention, labels)
    assert shared.ids_BL.tolist()[0] == [1, 2, 3, 4, 11, 12] and shared.ids_BL.tolist()[1][:2] == [9, 6]
    assert shared.positions_BL.tolist()[0] == [0, 1, 2, 3, 3, 4]
    assert shared.visible_BLL[0].long().tolist()[4:] == [[1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1]]
    predicted = {tuple(answer) for answer in shared.answers_N3.tolist()}
    assert predicted == {(0, 2, 4), (0, 3, 5), (0, 2, 11), (0, 4, 12), (0, 5, 13), (1, 0, 6), (1, 1, 7), (1, 0, 14)}


def test_model_with_windows_in_its_attention_is_refused(
    config_of: Callable[..., TrainConfig], toy_base: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=4, **shape)
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path / "windows")
    tokenizer.save_pretrained(tmp_path / "windows")
    with pytest.raises(InputError, match="not the plain causal one; set it to false"):
        trainer_of(config_of, base_model=str(tmp_path / "windows"), shared_prompt=True)


def test_rows_of_similar_length_share_a_batch_and_every_epoch_differs() -> None:
    lengths = [(7 * n) % 50 for n in range(103)]
    sampler = ByLength(lengths, 4, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(103)) and first == list(ByLength(lengths, 4, seed=1))
    spread = [max(b) - min(b) for b in ([lengths[i] for i in first[k : k + 4]] for k in range(0, 100, 4))]
    assert max(spread) <= 4
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_reference_is_computed_once_for_the_same_start_and_data(
    config_of: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = DpoTrainer.compute_ref_log_probs

    def counted(self: DpoTrainer, model: Any, inputs: Any) -> Any:
        computed.append(len(inputs["input_ids"]))
        return real(self, model, inputs)

    monkeypatch.setattr(DpoTrainer, "compute_ref_log_probs", counted)

    def columns(precision: str = "bf16", **more: Any) -> list[float]:
        config = config_of("dpo", reference_cache=tmp_path / "cache", precision=precision, **more)
        trainer = build_trainer(prepare(config), None)
        return [*trainer.train_dataset["ref_chosen_logps"][:], *trainer.eval_dataset["ref_rejected_logps"][:]]

    first = columns()
    once = len(computed)
    assert once and columns(learning_rate=1e-3, beta=0.7, seed=5) == first and len(computed) == once
    assert columns(max_length=200, precision="fp32") != first and len(computed) == 2 * once
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"torn")
    assert columns() == first and len(computed) == 3 * once


def test_reference_logps_stand_beside_their_own_rows(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """They are computed in the order of lengths, and kept in that of the rows."""
    rows = toy_feedback(40)
    for number, row in enumerate(rows["preference"]):
        (asked,) = json.loads(row["prompt"])
        row["prompt"] = json.dumps([{**asked, "content": asked["content"] + " again" * (number % 7)}])
    folder = write_dataset(tmp_path / "data", rows)
    trainer = build_trainer(prepare(config_of("dpo", dataset=folder, precision="fp32", reference_cache=None)), None)
    rows = trainer.train_dataset.select([5, 17])
    assert len(set(row_lengths(trainer.train_dataset))) > 1
    batch = trainer.data_collator([dict(row) for row in rows])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    assert chosen.tolist() == pytest.approx(rows["ref_chosen_logps"][:], abs=1e-3)
    assert rejected.tolist() == pytest.approx(rows["ref_rejected_logps"][:], abs=1e-3)
