"""One training run as a plain function: `train(config, data) -> TrainResult`.

It runs in this process, for a test or a notebook, and inside a Ray Train worker (`train.worker`), where
several processes call it together and accelerate splits every batch among them. The same configuration,
data and seed give the same adapter, whether the run was killed and resumed in between or not.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from cluster.errors import DatasetError, InputError
from data.template import template_digest
from train import checkpoint
from train.agree import on_first, together
from train.calibration import Calibration, calibrate
from train.callbacks import BestKeeper, HealthCallback, ProgressCallback, Schedule
from train.canary import write_canary
from train.config import TrainConfig, check_model_dir
from train.device import Device, for_packing, num_workers, resolve_device
from train.draw import drawn
from train.examples import Encoded, Encoder, TrainData, behind, check_data, read_data, read_split, under_prompt
from train.files import own_folder, recover, write_file, written_whole
from train.health import HealthWatch, check_changed, check_swapped, check_truncation, warnings_for
from train.models import check_weights, load_base, load_start, load_tokenizer, lora_config
from train.quiet import quiet_libraries
from train.report import HeldOut, graded_report, held_out_report, validation_prompts
from train.score_card import WEIGHTS_KEY, CardReport, report_on_cards
from train.weights import PLAIN, put_tensors, result_digest, start_of, trained_tensors, write_result
from train.worlds import check_world

log = logging.getLogger(__name__)

RESULT = "result.json"
Report = HeldOut | Calibration | CardReport
"""What is measured on held-out feedback: of a model that answers, or of one that scores."""


class Reporter(Protocol):
    """Where a run tells how it goes; called on every rank."""

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """What one step measured."""

    def checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint was written."""


@dataclass(frozen=True)
class TrainResult:
    """What a run produced."""

    method: str
    adapter_dir: Path
    """Folder of the adapter; of the whole model, after full fine-tuning."""
    adapter_sha256: str
    """Digest of what is in that folder."""
    metrics: dict[str, float]
    steps: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    examples: int = 0
    weights: str = "lora"
    """What was trained: `lora`, `qlora` or `full`."""
    base_model: str = ""
    template_digest: str = ""
    """Of the tokenizer that made the ids (`data.template.template_digest`)."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "adapter_dir": str(self.adapter_dir)}


def train(
    config: TrainConfig,
    data: TrainData | None = None,
    *,
    reporter: Reporter | None = None,
    resume_from: Path | None = None,
) -> TrainResult:
    """Train, and write the result to `config.out/adapter`, or to `config.out/model` when all weights moved.

    `data` is read from the dataset's files when it is not given. `resume_from` is a checkpoint folder.

    Raises:
        InputError: no model there, no GPU, a folder that cannot be written.
        DatasetError: empty or one-sided data.
        HealthGateError: a health gate closed; the message says which and why.
    """
    started = time.monotonic()
    return train_prepared(together(prepare)(config, data), reporter, resume_from, started)


def train_prepared(
    prepared: "Prepared", reporter: Reporter | None, resume_from: Path | None, started: float
) -> TrainResult:
    """The same for a run that has been prepared; `started` is a time of the monotonic clock."""
    with own_folder(prepared.config.out):
        return _train(prepared, reporter, resume_from, started)


def _train(prepared: "Prepared", reporter: Reporter | None, resume_from: Path | None, started: float) -> TrainResult:
    trainer = build_trainer(prepared, reporter)
    start = trained_tensors(trainer.model)
    if resume_from is not None:
        checkpoint.check_resumable(resume_from, prepared.digest)
        _restore(trainer, resume_from)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    return _finish(trainer, prepared, start, started)


@dataclass(frozen=True)
class Prepared:
    """A checked run: everything that can be refused has been."""

    config: TrainConfig
    device: Device
    data: TrainData
    tokenizer: Any
    encoder: Encoder
    rows: Encoded
    validation: Encoded
    warnings: list[str]
    digest: str
    """Configuration and data together: what a checkpoint belongs to."""
    workers: int = 1
    """Processes that share every step: each takes `batch_size` rows of it at a time."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.config.steps(len(self.rows.rows), self.workers)


def prepare(config: TrainConfig, data: TrainData | None = None) -> Prepared:
    """Check what can be checked before anything is computed or written."""
    device = _device_of(config)
    check_model_dir(config.base_model)
    check_weights(config, device)
    data = under_prompt(data or read_data(config.dataset, config.kind), config.prompt)
    data = replace(data, train=drawn(data.train, config.seed))
    check_data(config.method, config.kind, data, config.dataset)
    if config.plays_episodes:
        check_world(config.tools)
    quiet_libraries()
    from train.methods import METHODS

    tokenizer = load_tokenizer(config.base_model)
    encoder = Encoder(tokenizer, config.max_length, config.sft_loss)
    encode = METHODS[config.method].encode
    rows, validation = encode(encoder, data.train), encode(encoder, data.validation)
    check_truncation("training", rows, config.health, config.max_length)
    if config.kind == "preference":
        check_swapped(data.train, data.liked, config.health)
    warnings = warnings_for(config.method, config.sft_weight, data.train)
    for warning in warnings:
        log.warning("%s", warning)
    digest = checkpoint.digest_of(config.digest(), rows.rows, validation.rows)
    prepared = Prepared(config, device, data, tokenizer, encoder, rows, validation, warnings, digest, num_workers())
    _check_steps(prepared)
    return prepared


def _device_of(config: TrainConfig) -> Device:
    device = resolve_device(config.device, config.precision, config.threads)
    half = config.weights != "full"  # weights that are all trained are fp32, which flash attention has not
    return for_packing(device) if config.method == "sft" and config.packing and half else device


READ_BY = (
    "method", "base_model", "dataset", "prompt", "max_length", "sft_loss", "health", "prompts", "tools", "weights",
    "seed",
)  # fmt: skip
"""Fields that decide which rows are drawn, which token ids a run learns from, and whether it may."""


def prepare_like(prepared: Prepared, config: TrainConfig) -> Prepared:
    """Another run on the same token ids; prepared anew where its configuration makes others."""
    if any(getattr(prepared.config, name) != getattr(config, name) for name in READ_BY):
        return prepare(config)
    device = _device_of(config)
    warnings = warnings_for(config.method, config.sft_weight, prepared.data.train)
    digest = checkpoint.digest_of(config.digest(), prepared.rows.rows, prepared.validation.rows)
    found = replace(prepared, config=config, device=device, warnings=warnings, digest=digest)
    _check_steps(found)
    return found


def _check_steps(prepared: Prepared) -> None:
    """The rows must fill a step, and not more steps than a run may take."""
    config, rows = prepared.config, len(prepared.rows.rows)
    if not config.steps_per_epoch(rows, prepared.workers):
        needed = config.batch_size * config.gradient_accumulation * prepared.workers // config.group_size
        raise DatasetError(f"{rows} prompts are too few: one step takes {needed}; lower `training.batch_size`")
    config.steps(rows, prepared.workers)


def build_trainer(prepared: Prepared, reporter: Reporter | None) -> Any:
    """The TRL trainer of the method, with our checkpoints, gates and reports."""
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed

    from train.methods import METHODS, common_arguments, warmup_steps

    config, method = prepared.config, METHODS[prepared.config.method]
    if prepared.device.type == "cpu":
        torch.set_num_threads(prepared.device.threads)
    set_seed(config.seed)
    model = together(load_start)(config, prepared.device)
    at_once = config.batch_size * prepared.workers
    rows = method.arrange(prepared.rows.rows, config.seed, at_once)
    held_out = method.arrange(prepared.validation.rows, config.seed, at_once)
    common = common_arguments(config, prepared.device, prepared.steps)
    trainer = method.trainer(
        model=model,
        args=method.arguments(config, prepared.device, rows, common),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=prepared.tokenizer,
        peft_config=None if config.init_adapter or config.weights == "full" else lora_config(config, method.task),
        **method.more(config, prepared.device),
    )
    if getattr(trainer.args, "packing", False):  # in fewer rows, thus fewer steps
        packed = config.steps(len(trainer.train_dataset), prepared.workers)
        trainer.args.warmup_steps = warmup_steps(config, packed)
    trainer.base_model, trainer.monitored = config.base_model, method.monitored
    trainer.checkpoints, trainer.config_digest = config.out / "checkpoints", prepared.digest
    trainer.remove_callback(PrinterCallback)
    _add_callbacks(trainer, prepared, reporter)
    return trainer


def _add_callbacks(trainer: Any, prepared: Prepared, reporter: Reporter | None) -> None:
    from train.methods import METHODS

    config = prepared.config
    lengths = prepared.rows.lengths
    watch = trainer.watch = HealthWatch(config.health, config.beta, sum(lengths) / len(lengths) if lengths else None)
    answers = METHODS[config.method].task == "CAUSAL_LM"
    samples = config.health.length_samples if answers else 0
    prompts = validation_prompts(prepared.encoder, prepared.data.validation, samples)
    trainer.add_callback(BestKeeper(trainer, trainer.monitored))
    trainer.add_callback(HealthCallback(trainer, watch, prompts, prepared.tokenizer, config.max_completion_tokens))
    trainer.add_callback(Schedule(config.eval_steps, config.save_steps, bool(prepared.validation.rows)))
    if reporter is not None:
        trainer.add_callback(ProgressCallback(reporter.progress))
        trainer.saved = reporter.checkpoint


def _restore(trainer: Any, folder: Path) -> None:
    """What a checkpoint holds beside what the trainer reads: the best weights so far, and what health has seen."""
    from safetensors.torch import load_file

    from train.trainers import Best

    state = json.loads((folder / checkpoint.STATE).read_text())
    trainer.watch.restore(state["health"])
    weights = folder / checkpoint.BEST / checkpoint.BEST_WEIGHTS
    if state["best_loss"] is not None and weights.is_file():
        trainer.best = Best(state["best_loss"], state["best_step"], load_file(weights))


def _finish(trainer: Any, prepared: Prepared, start: Mapping[str, Any], started: float) -> TrainResult:
    """The best weights, measured and written by the first worker for all."""
    if trainer.best is not None:
        put_tensors(trainer.model, trainer.best.tensors)
    return on_first(partial(_leave_result, trainer, prepared, start, started))


def _leave_result(trainer: Any, prepared: Prepared, start: Mapping[str, Any], started: float) -> TrainResult:
    """Measure on held-out feedback, write the result, and only then let the checkpoints go."""
    config = prepared.config
    tensors = trained_tensors(trainer.model)
    unchanged = all(torch.equal(tensors[name], start[name]) for name in tensors)
    report = measure(trainer.model, prepared)
    warnings = prepared.warnings + check_changed(report.shift_nats_per_token, unchanged, config.health)
    folder = result_folder(config)
    with written_whole(folder) as scratch:
        write_result(scratch, trainer.model, prepared.tokenizer, config.base_model, _about(config))
        if config.weights != "full" and not config.scores:
            write_canary(scratch, trainer.model, prepared.tokenizer)
    write_report(config, report)
    result = TrainResult(
        method=config.method,
        adapter_dir=folder,
        adapter_sha256=result_digest(folder),
        metrics={**_final_metrics(trainer), **report.as_metrics()},
        steps=trainer.state.global_step,
        seconds=time.monotonic() - started,
        warnings=warnings,
        examples=len(prepared.rows.rows),
        weights=config.weights,
        base_model=config.base_model,
        template_digest=template_digest(prepared.tokenizer),
    )
    shown = {**result.as_json(), "config": config.digest()}
    write_file(config.out / RESULT, json.dumps(shown, indent=2) + "\n")
    checkpoint.discard_all(trainer.checkpoints)
    return result


def _about(config: TrainConfig) -> dict[str, str]:
    """What belongs to an adapter beside its weights."""
    return {WEIGHTS_KEY: config.head_weights.model_dump_json()} if config.method == "score_card" else PLAIN


def result_folder(config: TrainConfig) -> Path:
    """Where a run leaves what it trained."""
    return config.out / ("model" if config.weights == "full" else "adapter")


def write_report(config: TrainConfig, report: Report) -> None:
    """The calibration of a reward model, as numbers and as a plot, beside its adapter."""
    if isinstance(report, Calibration | CardReport):
        with written_whole(config.report_dir) as scratch:
            report.write(scratch)


def finished_result(config: TrainConfig) -> dict[str, Any] | None:
    """The result of a run that has ended well in this folder, if its adapter is still what it was."""
    recover(result_folder(config))
    try:
        result: dict[str, Any] = json.loads((config.out / RESULT).read_text())
        whole = result_digest(result_folder(config)) == result["adapter_sha256"]
    except (OSError, ValueError, KeyError, InputError):
        return None
    return result if whole and result.get("config") == config.digest() else None


def measure(model: Any, prepared: Prepared) -> Report:
    """The held-out report, on validation rows of the same dataset."""
    config = prepared.config
    own = prepared.data.validation
    if config.method == "score_card":
        return report_on_cards(model, prepared.validation.rows[: config.report_examples])
    if config.method == "reward":
        return calibrate(model, prepared.encoder, own.slice(0, config.report_examples))
    liked = own if config.kind == "sft" else _validation(config, "sft")
    pairs = own if config.kind == "preference" else _validation(config, "preference")
    longest = max(prepared.rows.lengths, default=32)
    base = partial(start_of, model, partial(load_base, config, prepared.device))
    report = held_out_report(
        model,
        base,
        prepared.encoder,
        liked,
        pairs,
        limit=config.report_examples,
        max_new_tokens=longest,
        seed=config.seed,
    )
    if config.method != "grpo":
        return report
    held_out = prepared.validation.rows[: config.report_examples]
    return graded_report(report, model, base, prepared.tokenizer, held_out, config)


def _validation(config: TrainConfig, kind: str) -> Any:
    table = read_split(config.dataset, kind, "validation")
    return table if config.prompt is None else behind(table, config.prompt)


def _final_metrics(trainer: Any) -> dict[str, float]:
    """The last training and validation numbers, and where the best adapter was found."""
    metrics: dict[str, float] = {}
    for entry in trainer.state.log_history:
        metrics |= {k: float(v) for k, v in entry.items() if isinstance(v, int | float) and k not in SPEED}
    if trainer.best is not None:
        metrics |= {f"best_{trainer.monitored}": abs(trainer.best.loss), "best_step": float(trainer.best.step)}
    return {name.replace("eval_", "validation/"): value for name, value in metrics.items()}


SPEED = {
    "step",
    "epoch",
    "total_flos",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_num_tokens",
}
"""Entries of the trainer's log that say nothing about what was learned."""
