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
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
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
from trl.trainer.utils import disable_dropout_in_model

from cluster.settings.training import ToolWorldSettings
from train import checkpoint
from train.config import TrainConfig
from train.device import Device
from train.episodes import Player
from train.examples import Encoded, Encoder, Row, with_kl_completions
from train.generate import Sampling, decode, end_tokens
from train.reference import References, references_of
from train.rewards import reward_function
from train.score_card import CardCollator, score_card_loss, weights_tensor
from train.shared_prompt import ByLength, SharedPrompt, add_answer_head, check_equal


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
    references: References | None = None
    """Reference log-probabilities of earlier runs."""

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def _prepare_dataset(self, dataset: Dataset, *_args: Any, **_kwargs: Any) -> Dataset:
        """The rows are token ids already (`train.examples`)."""
        return dataset

    def _precompute_ref_logps(self: Any, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probabilities as columns: those of an earlier run, else computed."""
        if self.references is None:
            columns = self._reference_logps(dataset, batch_size)
        else:
            key = self.references.key(dataset, self.reference_columns, batch_size)
            columns = self.references.read(key, len(dataset)) or self._reference_logps(dataset, batch_size)
            if self.accelerator.is_main_process:
                self.references.write(key, columns)
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    def _reference_logps(self: Any, dataset: Dataset, batch_size: int) -> dict[str, list[float]]:
        """The columns, in batches of rows of similar length."""
        lengths = row_lengths(dataset)
        order = sorted(range(len(dataset)), key=lambda row: -lengths[row])
        loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        found: dict[str, list[float]] = {column: [] for column in self.reference_columns}
        generator_state = torch.random.get_rng_state()
        for batch in loader:
            placed = {key: value.to(self.accelerator.device) for key, value in batch.items()}
            for column, logps in zip(found, self.compute_ref_log_probs(self.model, placed), strict=True):
                found[column] += logps.float().cpu().tolist()
        torch.random.set_rng_state(generator_state)
        back = sorted(range(len(order)), key=order.__getitem__)
        return {column: [values[place] for place in back] for column, values in found.items()}

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
    """DPO on `prompt_ids`, `chosen_ids` and `rejected_ids`; with `shared_prompt` by `train.shared_prompt`."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(
        self, *arguments: Any, references: References | None, shared_prompt: bool, precision: str, **named: Any
    ) -> None:
        self.references, self.shared_prompt, self.precision = references, shared_prompt, precision
        self.compared = not shared_prompt
        if shared_prompt:
            model = named["model"]
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            self.attention = base.config._attn_implementation
            add_answer_head(base)
        super().__init__(*arguments, **named)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of one batch; the first is computed both ways, and they must agree."""
        compute: Callable[..., tuple[Tensor, Tensor]] = super().compute_ref_log_probs
        if not self.shared_prompt:
            return compute(model, inputs)
        found = compute(SharedPrompt(model, self.attention), inputs)
        if not self.compared:
            check_equal(found, compute(model, inputs), inputs["completion_mask"].sum(1), self.precision)
            self.compared = True
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        called = SharedPrompt(model, self.attention) if self.shared_prompt else model
        return super()._compute_loss(called, inputs, return_outputs)

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        if not self.shared_prompt:
            return DPOTrainer._get_train_sampler(self, train_dataset)
        batch = self.args.per_device_train_batch_size * self.args.world_size
        return ByLength(row_lengths(train_dataset), batch, self.args.seed)


class KtoTrainer(Rayloop, KTOTrainer):  # type: ignore[misc]
    """KTO on `prompt_ids`, `completion_ids`, `KL_completion_ids` and `label`."""

    reference_columns = ("ref_logps", "ref_KL_logps")

    def __init__(self, *arguments: Any, references: References | None, **named: Any) -> None:
        self.references = references
        super().__init__(*arguments, **named)


class BradleyTerryTrainer(Rayloop, RewardTrainer):  # type: ignore[misc]
    """A reward model on `chosen_ids` and `rejected_ids`."""


class ScoreCardTrainer(Rayloop, Trainer):  # type: ignore[misc]
    """A reward model with four heads, on `input_ids` and `labels`; TRL has no trainer for it."""

    def __init__(self, *, model: Any, processing_class: Any, peft_config: Any, weights: Tensor, **named: Any) -> None:
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        self.weights = weights
        placed = model if peft_config is None else get_peft_model(model, peft_config)
        disable_dropout_in_model(placed)
        collator = CardCollator(processing_class.pad_token_id)
        super().__init__(model=placed, processing_class=processing_class, data_collator=collator, **named)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted cross-entropy of the heads."""
        scores_BH = inputs["labels"]
        out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        loss = score_card_loss(out.logits, scores_BH, self.weights.to(scores_BH.device))
        return (loss, out) if return_outputs else loss


class GrpoTrainer(Rayloop, GRPOTrainer):  # type: ignore[misc]
    """GRPO on `prompt` (ids as JSON text) and `item`; answers come from `train.generate`, or from episodes."""

    def __init__(self, *arguments: Any, tools: ToolWorldSettings, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if tools.answers != "none":
            self.player = Player(named["processing_class"], tools, self.max_completion_length)
            self.rollout_func = self._play

    def _play(self: Any, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Episodes, with what the tools wrote masked."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        was_training = model.training
        model.eval()
        episodes = self.player.play(model, prompts, self._sampling(len(prompts)))
        model.train(was_training)
        mode = "train" if was_training else "eval"
        self._metrics[mode]["tools/calls"].append(sum(len(e.calls) for e in episodes) / len(episodes))
        self._metrics[mode]["tools/failed_episodes"].append(sum(bool(e.failed) for e in episodes) / len(episodes))
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.ids for episode in episodes],
            "env_mask": [episode.mask for episode in episodes],
            "logprobs": None,
            "sample": [episode.sample() for episode in episodes],
        }

    def _sampling(self, count: int) -> Sampling:
        """Its seed comes from torch's state, which checkpoints keep."""
        return Sampling(self.max_completion_length, self.temperature, int(torch.randint(2**31, ())), count)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that `train.examples` made, instead of a rendering of TRL's own."""
        return [json.loads(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(
        self: Any, prompt_ids: list[list[int]], *_args: Any, **_kwargs: Any
    ) -> tuple[list[list[int]], None]:
        """Sampled answers."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        sampling = self._sampling(len(prompt_ids))
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
    more: Callable[[TrainConfig, Device], dict[str, Any]] = lambda config, device: {}
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
    return {"reward_funcs": [reward_function(config.grader, config.reward_model)], "tools": config.tools}


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each row, all its columns of ids together."""
    columns = [dataset[name] for name in dataset.column_names if name.endswith("_ids")]
    return [sum(map(len, row)) for row in zip(*columns, strict=True)]


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
