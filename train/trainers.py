"""TRL's trainers as we use them; they do the optimisation.

`Rayloop` is mixed into each: it feeds them token ids that are ready, keeps reference log-probabilities, and reads
and writes our checkpoints instead of pickles.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer
from trl import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    SFTTrainer,
)
from trl.trainer.utils import disable_dropout_in_model

from cluster.errors import RayloopError
from cluster.settings.training import ToolWorldSettings
from train import checkpoint
from train.agree import on_first
from train.episodes import Player
from train.generate import Sampling, decode, end_tokens
from train.health import HealthWatch
from train.reference import References
from train.score_card import CardCollator, score_card_loss
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
    watch: HealthWatch
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
            columns = self._kept_logps(key, len(dataset)) or self._reference_logps(dataset, batch_size)
            on_first(partial(self.references.write, key, columns))
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    def _kept_logps(self: Any, key: str, count: int) -> dict[str, list[float]] | None:
        """What the first worker finds in the cache, for all of them: they must agree on whether to compute."""
        found: list[dict[str, list[float]] | None] = [None]
        if self.accelerator.is_main_process:
            found = [self.references.read(key, count)]
        broadcast_object_list(found)
        return found[0]

    def _reference_logps(self: Any, dataset: Dataset, batch_size: int) -> dict[str, list[float]]:
        """The columns, in batches of rows of similar length, each computed by one worker and told to all."""
        lengths = row_lengths(dataset)
        order = sorted(range(len(dataset)), key=lambda row: -lengths[row])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        own = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        parts = gather_object([self._computed_or_refused(dataset, own)])
        values: dict[str, list[float]] = {column: [0.0] * len(dataset) for column in self.reference_columns}
        for part in parts:
            if isinstance(part, RayloopError):
                raise part
            for row, logps in part.items():
                for column, logp in zip(self.reference_columns, logps, strict=True):
                    values[column][row] = logp
        return values

    def _computed_or_refused(
        self: Any, dataset: Dataset, batches: Sequence[Sequence[int]]
    ) -> dict[int, tuple[float, ...]] | RayloopError:
        """Log-probabilities by row; a refusal as a value, for the other workers wait to be told."""
        generator_state = torch.random.get_rng_state()
        try:
            return dict(pair for rows in batches for pair in self._logps_of(dataset, rows))
        except RayloopError as error:
            return error
        finally:
            torch.random.set_rng_state(generator_state)

    def _logps_of(self: Any, dataset: Dataset, rows: Sequence[int]) -> Iterator[tuple[int, tuple[float, ...]]]:
        batch = self.data_collator([dataset[row] for row in rows])
        placed = {key: value.to(self.accelerator.device) for key, value in batch.items()}
        columns = [logps.float().tolist() for logps in self.compute_ref_log_probs(self.model, placed)]
        return zip(rows, zip(*columns, strict=True), strict=True)

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
        if folder is not None:
            checkpoint.load_scaler(self, Path(folder))


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

    def __init__(self, *arguments: Any, tools: ToolWorldSettings | None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if tools is not None:
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


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each row, all its columns of ids together."""
    columns = [dataset[name] for name in dataset.column_names if name.endswith("_ids")]
    return [sum(map(len, row)) for row in zip(*columns, strict=True)]
