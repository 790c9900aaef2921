"""The methods in one table: which examples, which TRL trainer, which arguments.

TRL's trainers do the optimisation. `Rayloop` is mixed into each: it feeds them token ids that are ready,
computes reference log-probabilities once where that is faster, and reads and writes our checkpoints
instead of pickles.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from train import checkpoint
from train.config import TrainConfig
from train.device import Device
from train.examples import Encoded, Encoder, Row, with_kl_completions
from train.generate import Sampling, decode, end_tokens
from train.rewards import reward_function


@dataclass(frozen=True)
class Best:
    """The weights with the lowest validation loss so far."""

    loss: float
    """Validation loss, or minus the validation reward."""
    step: int
    tensors: dict[str, Tensor]


class Rayloop:
    """What our trainers share; stands before a TRL trainer in the order of bases."""

    base_model: str
    checkpoints: Path
    config_digest: str
    best: Best | None = None
    monitored: str = "eval_loss"
    saved: Callable[[Path, int], None] | None = None
    """Called on every rank after a checkpoint was written, with its folder and step."""
    reference_columns: tuple[str, ...] = ()

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def _prepare_dataset(self, dataset: Dataset, *_args: Any, **_kwargs: Any) -> Dataset:
        """The rows are token ids already (`train.examples`)."""
        return dataset

    def _precompute_ref_logps(self: Any, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probabilities as columns, in memory; TRL's own leaves a file per run in a cache."""
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        columns: dict[str, list[float]] = {column: [] for column in self.reference_columns}
        generator_state = torch.random.get_rng_state()
        for batch in loader:
            placed = {key: value.to(self.accelerator.device) for key, value in batch.items()}
            for column, logps in zip(columns, self.compute_ref_log_probs(self.model, placed), strict=True):
                columns[column] += logps.float().cpu().tolist()
        torch.random.set_rng_state(generator_state)
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        folder = checkpoint.save_checkpoint(self, self.checkpoints, self.config_digest)
        if self.saved is not None:
            self.saved(folder, self.state.global_step)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self: Any, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_optimizer(self, Path(folder))

    def _load_rng_state(self: Any, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_random_state(Path(folder), self.args.process_index)

    def _load_scaler(self: Any, folder: str | None) -> None:
        """fp16's loss scale finds itself again within a few steps."""


class SftTrainer(Rayloop, SFTTrainer):  # type: ignore[misc]
    """SFT on `input_ids` and `labels`."""

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, packing: bool, *rest: Any, **named: Any
    ) -> Dataset:
        """Ready rows; TRL packs them where packing is on."""
        if not packing:
            return dataset
        return SFTTrainer._prepare_dataset(self, dataset, processing_class, args, packing, *rest, **named)


class DpoTrainer(Rayloop, DPOTrainer):  # type: ignore[misc]
    """DPO on `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")


class KtoTrainer(Rayloop, KTOTrainer):  # type: ignore[misc]
    """KTO on `prompt_ids`, `completion_ids`, `KL_completion_ids` and `label`."""

    reference_columns = ("ref_logps", "ref_KL_logps")


class BradleyTerryTrainer(Rayloop, RewardTrainer):  # type: ignore[misc]
    """A reward model on `chosen_ids` and `rejected_ids`."""


class GrpoTrainer(Rayloop, GRPOTrainer):  # type: ignore[misc]
    """GRPO on `prompt` (ids as JSON text) and `item`; answers come from `train.generate`."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that `train.examples` made, instead of a rendering of TRL's own."""
        return [json.loads(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(
        self: Any, prompt_ids: list[list[int]], *_args: Any, **_kwargs: Any
    ) -> tuple[list[list[int]], None]:
        """Sampled answers; their seed comes from torch's state, which checkpoints keep."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        seed = int(torch.randint(2**31, ()))
        sampling = Sampling(self.max_completion_length, self.temperature, seed, len(prompt_ids))
        was_training = model.training
        model.eval()
        answers = decode(model, prompt_ids, end_tokens(model, self.processing_class), sampling)
        model.train(was_training)
        return answers, None


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
    more: Callable[[TrainConfig], dict[str, Any]] = lambda config: {}
    """What else the trainer is made with."""


def _sft_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> SFTConfig:
    packing = config.packing and device.type == "cuda" and device.attention.startswith("flash")
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
        precompute_ref_log_probs=config.epochs > 1,
    )


def _kto_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> KTOConfig:
    return KTOConfig(
        **common,
        max_length=config.max_length,
        beta=config.beta,
        desirable_weight=config.desirable_weight or balanced_weight(rows, config.undesirable_weight),
        undesirable_weight=config.undesirable_weight,
        precompute_ref_log_probs=config.epochs > 1,
    )


def _reward_arguments(config: TrainConfig, device: Device, rows: Sequence[Row], common: dict[str, Any]) -> RewardConfig:
    return RewardConfig(**common, max_length=config.max_length, center_rewards_coefficient=config.center_weight or None)


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
    "dpo": Method(DpoTrainer, _dpo_arguments, Encoder.preference, _as_they_are),
    "kto": Method(KtoTrainer, _kto_arguments, Encoder.unpaired, _kto_order),
    "reward": Method(BradleyTerryTrainer, _reward_arguments, Encoder.scored, _as_they_are, task="SEQ_CLS"),
    "grpo": Method(
        GrpoTrainer,
        _grpo_arguments,
        Encoder.prompts,
        _as_they_are,
        monitored="eval_reward",
        more=lambda config: {"reward_funcs": [reward_function(config.grader, config.reward_model)]},
    ),
}


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
        "warmup_steps": min(config.warmup_steps, round(steps * config.warmup_max_ratio)),
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
