"""The methods in one table: which examples, which trainer, which arguments."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments
from trl import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RewardConfig,
    SFTConfig,
)

from train.agree import together
from train.config import TrainConfig
from train.device import Device
from train.examples import Encoded, Encoder, Row, with_kl_completions
from train.reference import references_of
from train.rewards import reward_function
from train.score_card import weights_tensor
from train.trainers import (
    BradleyTerryTrainer,
    DpoTrainer,
    GrpoTrainer,
    KtoTrainer,
    ScoreCardTrainer,
    SftTrainer,
)


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    trainer: type[Any]
    arguments: Callable[[TrainConfig, Device, Sequence[Row], dict[str, Any]], Any]
    encode: Callable[[Encoder, Any], Encoded]
    arrange: Callable[[Sequence[Row], int, int], list[Row]]
    """Puts rows in the order, and gives them the columns, that the trainer wants; from the rows, the seed, and
    the number of rows that all workers read at a time."""
    monitored: str = "eval_loss"
    """What decides which weights are the best; a reward is better when it is higher."""
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
    """A model that answers, or one that scores."""
    more: Callable[[TrainConfig, Device], dict[str, Any]] = lambda config, device: {}
    """What else the trainer is made with."""


def _sft_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> SFTConfig:
    packing = config.packing and device.attention.startswith("flash")
    return SFTConfig(**common, max_length=config.max_length, packing=packing, padding_free=packing)


def _dpo_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> DPOConfig:
    terms = [("sigmoid", 1.0), ("sft", config.sft_weight)]
    used = [(name, weight) for name, weight in terms if weight]
    return DPOConfig(
        **common,
        max_length=config.max_length,
        beta=config.beta,
        loss_type=[name for name, _ in used],
        loss_weights=[weight for _, weight in used],
        precompute_ref_log_probs=config.shared_prompt or _reads_all(config, rows),
    )


def _kto_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> KTOConfig:
    return KTOConfig(
        **common,
        max_length=config.max_length,
        beta=config.beta,
        desirable_weight=config.desirable_weight or balanced_weight(rows, config.undesirable_weight),
        undesirable_weight=config.undesirable_weight,
        precompute_ref_log_probs=_reads_all(config, rows),
    )


def _reward_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> RewardConfig:
    return RewardConfig(**common, max_length=config.max_length, center_rewards_coefficient=config.center_weight or None)


def _score_card_arguments(
    config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]
) -> TrainingArguments:
    return TrainingArguments(**common, label_names=["labels"])


def _grpo_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> GRPOConfig:
    named = {**common, "remove_unused_columns": False}  # `item` is the grader's
    return GRPOConfig(
        **named,
        beta=config.beta,
        num_generations=config.group_size,
        num_generations_eval=1,
        temperature=config.temperature,
        max_completion_length=config.max_completion_tokens,
        scale_rewards=config.reward_scale,
        steps_per_generation=config.gradient_accumulation,
        disable_dropout=True,
    )


def _reads_all(config: TrainConfig, rows: Sequence[Row]) -> bool:
    """Whether the run sees every row, so that its reference is best computed before, and kept."""
    seen = (config.max_steps or len(rows)) * config.batch_size * config.gradient_accumulation
    return config.epochs >= 1 and seen >= len(rows)


def _references(config: TrainConfig, device: Device) -> dict[str, Any]:
    return {"references": references_of(config, device)}


def _dpo_more(config: TrainConfig, device: Device) -> dict[str, Any]:
    return {**_references(config, device), "shared_prompt": config.shared_prompt, "precision": device.precision}


def _grpo_more(config: TrainConfig, device: Device) -> dict[str, Any]:
    return {
        "reward_funcs": [together(reward_function(config.grader, config.reward_model))],
        "tools": config.tools if config.plays_episodes else None,
    }


def balanced_weight(rows: Sequence[Row], undesirable_weight: float) -> float:
    """Weight of liked answers under which they count at least as much as the disliked, never under 1.

    Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 9: the ratio of the two
    sides should lie between 1 and 4/3.
    """
    liked = sum(bool(row["label"]) for row in rows)
    return max(1.0, undesirable_weight * (len(rows) - liked) / max(liked, 1))


def _as_they_are(rows: Sequence[Row], seed: int, together: int) -> list[Row]:
    return list(rows)


def _kto_order(rows: Sequence[Row], seed: int, together: int) -> list[Row]:
    """KTO reads rows in order, so they are shuffled once, and paired within each batch of that order."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return with_kl_completions(shuffled, together)


METHODS: dict[str, Method] = {
    "sft": Method(SftTrainer, _sft_arguments, Encoder.sft, _as_they_are),
    "dpo": Method(DpoTrainer, _dpo_arguments, Encoder.preference, _as_they_are, more=_dpo_more),
    "kto": Method(KtoTrainer, _kto_arguments, Encoder.unpaired, _kto_order, more=_references),
    "reward": Method(BradleyTerryTrainer, _reward_arguments, Encoder.scored, _as_they_are, task="SEQ_CLS"),
    "score_card": Method(
        ScoreCardTrainer,
        _score_card_arguments,
        Encoder.cards,
        _as_they_are,
        task="SEQ_CLS",
        more=lambda config, device: {"weights": weights_tensor(config.head_weights)},
    ),
    "grpo": Method(
        GrpoTrainer,
        _grpo_arguments,
        Encoder.prompts,
        _as_they_are,
        monitored="eval_reward",
        more=_grpo_more,
    ),
}


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Steps with a rising learning rate, of a run of so many."""
    return min(config.warmup_steps, round(steps * config.warmup_max_ratio))


def common_arguments(config: TrainConfig, device: Device, steps: int) -> dict[str, Any]:
    """Arguments that mean the same to every trainer."""
    checkpointing = config.gradient_checkpointing
    return {
        "output_dir": str(config.out),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": max(config.batch_size, 8),
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule if config.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": warmup_steps(config, steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch",
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": device.type == "cpu",
        "bf16": device.precision == "bf16",
        "fp16": device.precision == "fp16",
        "gradient_checkpointing": device.type == "cuda" if checkpointing == "auto" else checkpointing == "on",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": device.type == "cuda",
        "eval_strategy": "no",  # `Schedule` decides, so that it always comes before a checkpoint
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": True,
    }
