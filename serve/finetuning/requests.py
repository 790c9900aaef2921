"""What a client may ask of a new job, checked field by field, and what it means for a training here."""

import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from cluster.settings import Settings
from data.finetuning.rows import METHOD_FORMATS, Json
from data.finetuning.uploads import StoredFile
from data.grading.make import make_grader
from serve.openai import unknown_model
from serve.snapshot import Snapshot

FIELDS = {
    "model", "training_file", "validation_file", "method", "hyperparameters", "suffix", "seed", "integrations",
    "metadata",
}  # fmt: skip
METHODS = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
"""The API's word for a method -> ours."""
HYPERPARAMETERS: dict[str, tuple[str, ...]] = {
    "supervised": ("n_epochs", "batch_size", "learning_rate_multiplier"),
    "dpo": ("n_epochs", "batch_size", "learning_rate_multiplier", "beta"),
    "reinforcement": (
        "n_epochs", "batch_size", "learning_rate_multiplier", "compute_multiplier", "eval_interval", "eval_samples",
        "reasoning_effort",
    ),
}  # fmt: skip
MEANINGLESS = {
    "reasoning_effort": "has no meaning for these models",
    "eval_samples": "has no meaning here: an evaluation answers every line of the validation file once",
}
WHOLE = ("n_epochs", "batch_size", "eval_interval")
SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")
ITEM_FIELD = re.compile(r"\{\{\s*item\.([A-Za-z0-9_]+)")
MAX_SEED = 2**31 - 1
MAX_METADATA, METADATA_NAME_CHARACTERS, METADATA_VALUE_CHARACTERS = 16, 64, 512
AUTO = "auto"


@dataclass(frozen=True)
class Base:
    """What a `model` stands for."""

    ref: str
    """For `rayloop train run --base`."""
    agent: str | None
    short: str
    """The part of the new model's name."""


def resolve_model(model: Any, snapshot: Snapshot, tenant: str, settings: Settings) -> Base:
    """A base model by name, an agent (its stable version), a version or fine-tuned model of this tenant.

    Raises:
        ApiError: 404 with the names there are.
    """
    named = base_models(settings)
    if isinstance(model, str):
        if model in named:
            return Base(named[model], None, _short(model))
        for key, route in snapshot.routes.items():
            if key.tenant == tenant and key.agent == model:
                return Base(route.stable, model, _short(model))
        target = snapshot.targets.get(model)
        if target is not None and snapshot.visible(tenant, model):
            short = model.split(":")[1] if model.startswith("ft:") else _short(model)
            return Base(target.version, target.version.rpartition("/")[0], short)
    raise unknown_model(model, [*named, *snapshot.known_models(tenant)])


def base_models(settings: Settings) -> dict[str, str]:
    """Name -> folder or hub id of the base models that may be trained."""
    found = {Path(base).name: base for base in (settings.training.base_model, settings.engine.base_model) if base}
    return found | settings.finetuning.base_models


def _short(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def parse_method(document: Json, settings: Settings) -> Json:
    """The `method` object with every hyperparameter checked; `auto` where none was given.

    Raises:
        InputError: an unknown method or hyperparameter, a value out of bounds, a grader that cannot work.
    """
    method = document.get("method")
    if method is None:
        method = {"type": "supervised", "supervised": {"hyperparameters": document.get("hyperparameters") or {}}}
    kind = method.get("type") if isinstance(method, dict) else method
    if not isinstance(method, dict) or not isinstance(kind, str) or kind not in METHODS:
        raise InputError("method.type", kind, f"must be one of {', '.join(METHODS)}", "name a known method")
    own = method.get(kind) or {}
    _known(method, {"type", kind}, "method.")
    allowed = {"hyperparameters", "grader", "response_format"} if kind == "reinforcement" else {"hyperparameters"}
    _known(own, allowed, f"method.{kind}.")
    given = own.get("hyperparameters") or {}
    _known(given, set(HYPERPARAMETERS[kind]), f"method.{kind}.hyperparameters.")
    checked = {
        name: _hyperparameter(name, given.get(name), f"method.{kind}.hyperparameters.{name}", settings)
        for name in HYPERPARAMETERS[kind]
    }
    if kind == "reinforcement":
        if own.get("grader") is None:
            raise InputError("method.reinforcement.grader", None, "is missing", "describe how answers are graded")
        make_grader(own["grader"], field="method.reinforcement.grader")
    return {"type": kind, kind: {**own, "hyperparameters": checked}}


def _hyperparameter(name: str, value: Any, field: str, settings: Settings) -> Any:
    if value is None or value == AUTO:
        return AUTO
    if name in MEANINGLESS:
        raise InputError(field, value, MEANINGLESS[name], "leave it out")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (name in WHOLE and value != int(value)):
        rule = "must be a whole number above 0, or auto" if name in WHOLE else "must be a number above 0, or auto"
        raise InputError(field, value, rule, "change it or leave it out")
    limits = settings.training.limits
    bounds = {
        "n_epochs": (limits.max_epochs, "training.limits.max_epochs"),
        "batch_size": (4096, "the highest batch size"),
        "beta": (100, "the highest beta"),
        "compute_multiplier": (settings.finetuning.max_compute_multiplier, "finetuning.max_compute_multiplier"),
        "eval_interval": (limits.max_steps, "training.limits.max_steps"),
    }
    highest, rule = bounds.get(name, (math.inf, ""))
    if value > highest:
        raise InputError(field, value, f"must not exceed {highest:g}, {rule}", "lower it")
    return int(value) if name in WHOLE else value


def overrides_of(method: Json, seed: int, settings: Settings) -> Json:
    """Fields of a training's configuration; what is `auto` is left to the settings.

    Raises:
        InputError: the learning rate would be 0, or exceed 1.
    """
    kind = method["type"]
    chosen = {name: value for name, value in method[kind]["hyperparameters"].items() if value != AUTO}
    found: Json = {"seed": seed}
    if "n_epochs" in chosen:
        found["epochs"] = float(chosen["n_epochs"])
    if "beta" in chosen:
        found["beta"] = float(chosen["beta"])
    if kind == "reinforcement":
        group = _group_size(chosen, settings)
        found |= {"grader": method[kind]["grader"], "group_size": group}
        found |= _batches(_examples_per_step(kind, chosen, settings) * group, settings)
    elif "batch_size" in chosen:
        found |= _batches(chosen["batch_size"], settings)
    if "eval_interval" in chosen:
        found["eval_steps"] = chosen["eval_interval"]
    own = getattr(settings.training, METHODS[kind], None)
    if "learning_rate_multiplier" in chosen and own is not None:
        found["learning_rate"] = own.learning_rate * chosen["learning_rate_multiplier"]
        if not 0 < found["learning_rate"] <= 1:
            field = f"method.{kind}.hyperparameters.learning_rate_multiplier"
            rule = f"gives a learning rate of {found['learning_rate']:g}, which must be above 0 and at most 1"
            raise InputError(field, chosen["learning_rate_multiplier"], rule, "change it")
    return found


def _batches(examples: int, settings: Settings) -> Json:
    """A step of so many examples, in the largest equal parts that fit one forward pass."""
    size = max(n for n in range(1, settings.training.batch_size + 1) if examples % n == 0)
    return {"batch_size": size, "gradient_accumulation": examples // size}


def _group_size(chosen: Json, settings: Settings) -> int:
    """Answers sampled for each prompt: what `compute_multiplier` multiplies."""
    return max(2, round(settings.training.grpo.group_size * float(chosen.get("compute_multiplier", 1))))


def _examples_per_step(kind: str, chosen: Json, settings: Settings) -> int:
    """Lines of the training file that one optimiser step reads."""
    if "batch_size" in chosen:
        return int(chosen["batch_size"])
    automatic = settings.training.batch_size * settings.training.gradient_accumulation
    return max(1, automatic // settings.training.grpo.group_size) if kind == "reinforcement" else automatic


def parse_create(document: Json, settings: Settings) -> Json:
    """The fields of a new job but for its model and files: `method`, `overrides`, `seed`, `suffix`, `metadata`.

    Raises:
        InputError: names the field.
    """
    _known(document, FIELDS, "")
    if settings.training.weights == "full":
        rule = "makes whole models, and an engine serves `ft:` models as adapters of its base"
        raise InputError(
            "training.weights", "full", rule, "set lora or qlora; train whole models by `rayloop train run`"
        )
    if document.get("integrations"):
        raise InputError("integrations", document["integrations"], "are not supported", "runs are in MLflow")
    seed = document.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED):
        raise InputError("seed", seed, f"must be a whole number from 0 to {MAX_SEED}", "change it or leave it out")
    seed = random.randrange(MAX_SEED) if seed is None else seed
    suffix = document.get("suffix")
    if suffix is not None and (not isinstance(suffix, str) or not SUFFIX.fullmatch(suffix)):
        raise InputError("suffix", suffix, "must be 1 to 64 letters, digits, - or _", "change it or leave it out")
    method = parse_method(document, settings)
    return {
        "method": method,
        "overrides": overrides_of(method, seed, settings),
        "seed": seed,
        "suffix": suffix,
        "metadata": _metadata(document.get("metadata")),
    }


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    fits = isinstance(value, dict) and len(value) <= MAX_METADATA
    if not fits or not all(_is_metadata(name, text) for name, text in value.items()):
        rule = (
            f"must be at most {MAX_METADATA} texts of {METADATA_VALUE_CHARACTERS} characters "
            f"under names of {METADATA_NAME_CHARACTERS}"
        )
        raise InputError("metadata", value, rule, "shorten it")
    return dict(value)


def _is_metadata(name: str, text: Any) -> bool:
    return isinstance(text, str) and len(text) <= METADATA_VALUE_CHARACTERS and len(name) <= METADATA_NAME_CHARACTERS


def file_id(field: str, value: Any) -> str:
    """What names a file.

    Raises:
        InputError: it is no text that could be an id.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(field, value, "must be the id of a file", "upload it with purpose fine-tune")
    return value


def check_files(method: Json, training: StoredFile, validation: StoredFile | None, settings: Settings) -> None:
    """Files must have the method's format, not be one file, and fit the limit of steps.

    Raises:
        InputError: names the file or the hyperparameter.
    """
    kind = method["type"]
    for field, stored in (("training_file", training), ("validation_file", validation)):
        if stored is not None and stored.format != METHOD_FORMATS[kind]:
            rule = f"has the format `{stored.format}`, {kind} needs `{METHOD_FORMATS[kind]}`"
            raise InputError(field, stored.file_id, rule, "upload a file for this method or change the method")
    if validation is not None and validation.sha256 == training.sha256:
        rule = "has the same content as training_file"
        raise InputError("validation_file", validation.file_id, rule, "hold examples out, or leave it out")
    limits, own = settings.training.limits, getattr(settings.training, METHODS[kind])
    chosen = {name: value for name, value in method[kind]["hyperparameters"].items() if value != AUTO}
    batch, epochs = _examples_per_step(kind, chosen, settings), chosen.get("n_epochs", own.epochs)
    if kind == "reinforcement" and training.rows < batch:
        rule = f"means {batch} lines a step, and training_file has {training.rows}"
        raise InputError(f"method.{kind}.hyperparameters.batch_size", batch, rule, "lower it or send more")
    steps = math.ceil(math.ceil(training.rows / batch) * epochs)
    if steps > limits.max_steps:
        rule = f"means {steps} steps, more than training.limits.max_steps={limits.max_steps}"
        raise InputError(f"method.{kind}.hyperparameters.n_epochs", epochs, rule, "train less")


def item_check(grader: Mapping[str, Any]) -> Callable[[Json], None]:
    """Checks that an item has every field which the grader's templates read."""
    needed = sorted(set(ITEM_FIELD.findall(json.dumps(grader))))

    def check(item: Json) -> None:
        for name in needed:
            if name not in item:
                raise InputError(f"item.{name}", None, "is missing, and the grader reads it", "add it to the line")

    return check


def served_name(base: Base, tenant: str, suffix: str | None, job_id: str) -> str:
    """`ft:BASE:TENANT:SUFFIX:ID`."""
    return f"ft:{base.short}:{tenant}:{suffix or ''}:{job_id.removeprefix('ftjob-')[:8]}"


def _known(value: Any, known: set[str], field: str) -> None:
    if not isinstance(value, dict):
        raise InputError(field.rstrip(".") or "body", value, "must be an object", "see docs/fine-tuning.md")
    for unknown in sorted(map(str, value.keys() - known)):
        rule = f"is not known here; known are {', '.join(sorted(known))}"
        raise InputError(f"{field}{unknown}", value.get(unknown), rule, "take it out")
