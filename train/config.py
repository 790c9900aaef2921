"""What one training run does, fully resolved: nothing is looked up in the settings after this."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from cluster.errors import InputError
from cluster.model_files import read_adapter_config
from cluster.settings import Settings
from cluster.settings.base import Section
from cluster.settings.training import (
    HeadWeights,
    HealthSettings,
    LimitSettings,
    LoraSettings,
    ToolWorldSettings,
    TrainingSettings,
)

MethodName = Literal["sft", "dpo", "kto", "reward", "score_card", "grpo"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
KINDS = {
    "sft": "sft",
    "dpo": "preference",
    "kto": "unpaired",
    "reward": "preference",
    "score_card": "reward",
    "grpo": "sft",
}
"""The kind of examples each method learns from."""
SCORING_METHODS = ("reward", "score_card")
"""Methods whose model scores answers and gives none."""
KL_METHODS = ("dpo", "kto", "grpo")
"""Methods that hold the model near its start, with the coefficient `beta`."""


class TrainedPrompt(Section):
    """The agent's prompt that examples are trained behind, whatever they were recorded behind."""

    digest: str
    """Of `text`; that of an empty text where the agent has none."""
    text: str
    recorded: dict[str, str] = Field(default_factory=dict)
    """Digest -> text of the prompts that examples of the dataset begin with."""


class TrainConfig(Section):
    """One run: a method, a base model, a dataset, and every number of it."""

    method: MethodName
    base_model: str
    """Local path or hub id."""
    init_adapter: str | None = None
    """Adapter to go on from; for DPO and KTO it is then the reference as well."""
    dataset: Path
    """Folder of a curated dataset."""
    prompt: TrainedPrompt | None = None
    """The agent's prompt now; `None` leaves examples as they were recorded."""
    out: Path
    """Folder that holds checkpoints while it runs and the result at the end."""
    weights: Literal["lora", "qlora", "full"] = "lora"
    """What is trained: an adapter, an adapter on a base in 4 bits, or the whole model."""
    lora: LoraSettings = LoraSettings()
    learning_rate: float = Field(gt=0, le=1)
    epochs: float = Field(gt=0)
    beta: float | None = Field(None, gt=0, le=100)
    """KL coefficient; `None` for SFT and reward models."""
    sft_loss: Literal["answer", "assistant", "all"] = "answer"
    """SFT: tokens in the loss."""
    sft_weight: float = Field(1.0, ge=0)
    """DPO: weight of the SFT term."""
    shared_prompt: bool = False
    """DPO: read the prompt of a pair once (`train.shared_prompt`)."""
    reference_cache: Path | None = None
    """DPO and KTO: folder of reference log-probabilities that runs share; `None` computes them anew."""
    desirable_weight: float | None = Field(None, gt=0)
    """KTO: weight of liked answers; `None` balances them with the disliked."""
    undesirable_weight: float = Field(1.0, gt=0)
    """KTO: weight of disliked answers."""
    center_weight: float = Field(0.01, ge=0)
    """Reward model: weight of the term that holds the mean score of a pair at 0."""
    head_weights: HeadWeights = HeadWeights()
    """Score cards: how much each head counts."""
    group_size: int = Field(8, ge=2)
    """GRPO: answers sampled for each prompt."""
    temperature: float = Field(1.0, gt=0)
    """GRPO: of the sampling."""
    max_completion_tokens: int = Field(256, ge=1)
    """GRPO: longest sampled answer."""
    reward_scale: Literal["group", "batch", "none"] = "group"
    """GRPO: the spread that rewards are divided by."""
    prompts: Literal["liked", "tasks"] = "liked"
    """GRPO: the prompts of liked examples (or, with `tools`, of trajectories), or tasks with fields for the grader."""
    tools: ToolWorldSettings = ToolWorldSettings()
    """GRPO: who answers an agent's tool calls."""
    grader: dict[str, Any] = Field(default_factory=dict)
    """GRPO: what gives the reward (`data.grading`)."""
    reward_model: str | None = None
    """GRPO: the reward model behind a grader that asks one, as in `evaluation.reward_model`."""
    packing: bool = True
    """SFT: pack short rows where the attention kernel allows it."""
    batch_size: int = Field(4, ge=1)
    gradient_accumulation: int = Field(4, ge=1)
    warmup_steps: int = Field(100, ge=0)
    warmup_max_ratio: float = Field(0.1, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(2048, ge=16)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, whatever `epochs` says."""
    seed: int = Field(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    threads: int = Field(0, ge=0)
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    eval_steps: int = Field(100, ge=1)
    save_steps: int = Field(200, ge=1)
    report_examples: int = Field(256, ge=0)
    """Validation examples of each kind in the report on held-out feedback."""
    health: HealthSettings = HealthSettings()
    limits: LimitSettings = LimitSettings()

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> "TrainConfig":
        if self.method in KL_METHODS and self.beta is None:
            raise ValueError(f"`beta` is needed for {self.method}")
        if self.epochs > self.limits.max_epochs:
            raise ValueError(f"`epochs`={self.epochs:g} exceeds training.limits.max_epochs={self.limits.max_epochs:g}")
        answers = self.batch_size * self.gradient_accumulation
        if self.method == "grpo" and answers % self.group_size:
            raise ValueError(f"the {answers} answers of a step must be a multiple of `group_size`={self.group_size}")
        if self.init_adapter and self.weights != "lora":
            raise ValueError(f"{self.weights} cannot go on from an adapter; export it as a merged model first")
        if self.init_adapter and self.scores:
            raise ValueError("a reward model starts from a base model, not from an adapter that answers")
        return self

    @property
    def kind(self) -> str:
        """The kind of examples the method learns from."""
        if self.method == "grpo" and self.prompts == "tasks":
            return "task"
        return "trajectory" if self.plays_episodes else KINDS[self.method]

    @property
    def plays_episodes(self) -> bool:
        """True for GRPO on an agent with tools."""
        return self.method == "grpo" and self.tools.answers != "none" and self.prompts == "liked"

    @property
    def scores(self) -> bool:
        """True for a reward model: it scores answers and gives none."""
        return self.method in SCORING_METHODS

    def steps_per_epoch(self, rows: int, workers: int) -> int:
        """Optimiser steps of one pass over so many rows; GRPO leaves out prompts that fill no step."""
        answers = self.batch_size * self.gradient_accumulation * workers
        return rows * self.group_size // answers if self.method == "grpo" else math.ceil(rows / answers)

    def steps(self, rows: int, workers: int) -> int:
        """Optimiser steps of the run.

        Raises:
            InputError: more than a run may take.
        """
        steps = self.max_steps or math.ceil(self.steps_per_epoch(rows, workers) * self.epochs)
        if steps > self.limits.max_steps:
            rule = f"means {steps} steps, more than training.limits.max_steps={self.limits.max_steps}"
            raise InputError("train.epochs", self.epochs, rule, "train less or raise the limit")
        return steps

    @property
    def report_dir(self) -> Path:
        """Folder of plots that a run may leave beside its result."""
        return self.out / "report"

    def digest(self) -> str:
        """SHA-256 of everything that decides the result; a resumed run must have the same."""
        ignored = {"out", "dataset", "device", "limits", "threads", "reference_cache", "save_steps"}
        shown = json.dumps(self.model_dump(mode="json", exclude=ignored), sort_keys=True)
        return hashlib.sha256(shown.encode()).hexdigest()


def resolve_config(settings: Settings, method: str, **overrides: Any) -> TrainConfig:
    """The configuration of one run: settings of the method, under what was asked for.

    `overrides` are fields of `TrainConfig`; `None` means not asked for.

    Raises:
        InputError: an unknown method, or a value that breaks its rule.
    """
    if method not in METHOD_NAMES:
        raise InputError("method", method, f"must be one of {', '.join(METHOD_NAMES)}", "choose one of them")
    training = settings.training
    shared = {name for name in TrainConfig.model_fields if name in type(training).model_fields}
    values: dict[str, Any] = {name: getattr(training, name) for name in shared}
    own = getattr(training, method)
    values |= {name: getattr(own, name) for name in type(own).model_fields if name in TrainConfig.model_fields}
    values["reward_model"] = settings.evaluation.reward_model
    values["reference_cache"] = settings.home / "references"
    if method == "sft":
        values["sft_loss"] = own.loss
    asked = {name: value for name, value in overrides.items() if value is not None}
    if method not in KL_METHODS:
        asked.pop("beta", None)
    if asked.get("weights", training.weights) == "full":
        full = {name: getattr(own, f"full_{name}", None) for name in ("learning_rate", "batch_size")}
        values |= {name: value for name, value in full.items() if value is not None}
    try:
        config = TrainConfig(**(values | asked), method=method)
    except ValidationError as error:
        raise broken_rule(error, method) from None
    check_rank(settings, config)
    return config


def broken_rule(error: ValidationError, method: str) -> InputError:
    """The first rule that a configuration broke, in one line."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    field = f"train.{name}" if name else "train"
    value = problem["input"] if name else method
    rule = problem["msg"].removeprefix("Value error, ")
    return InputError(field, value, rule[0].lower() + rule[1:], "mend it on the command line or in rayloop.yaml")


def check_rank(settings: Settings, config: TrainConfig) -> None:
    """Refuse an adapter that the engine would not load.

    Raises:
        InputError: its rank, or that of the adapter it goes on from, is over the engine's.
    """
    limit, field, rank = settings.engine.max_rank, "training.lora.r", config.lora.r
    if config.weights == "full" or config.scores:
        return
    if config.init_adapter is not None:
        field, rank = "init_adapter", int(read_adapter_config(Path(config.init_adapter))["r"])
    if rank > limit:
        remedy = (
            "lower it" if config.init_adapter is None else "start from an adapter of lower rank, or raise the limit"
        )
        raise InputError(field, rank, f"is over engine.max_rank={limit}: no engine would load the adapter", remedy)


def setting_of(method: str, name: str) -> str:
    """The setting behind a field of a training: `lora.r` is `training.lora.r`, DPO's `beta` `training.dpo.beta`."""
    first = name.partition(".")[0]
    if first == "reward_model":
        return f"evaluation.{name}"
    if first in TrainingSettings.model_fields:
        return f"training.{name}"
    return f"training.{method}.{'loss' if name == 'sft_loss' else name}"


def check_model_dir(model: str | Path) -> None:
    """Refuse a local path that holds no model; a hub id (`organisation/name`) passes.

    Raises:
        InputError: the path does not exist, or has no config.json.
    """
    path = Path(model).expanduser()
    looks_local = path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1
    if (path.is_dir() or looks_local) and not (path / "config.json").is_file():
        problem = "holds no model (config.json is missing)" if path.is_dir() else "does not exist"
        raise InputError("base_model", str(model), problem, "name a transformers directory or a hub id")
