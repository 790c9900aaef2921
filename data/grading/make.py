"""From a configuration to a grader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.errors import InputError
from data.grading.dataset_label import DatasetLabel, DatasetLabelConfig
from data.grading.multi import Multi, MultiConfig
from data.grading.reward_model import RewardModelConfig, Scorer, reward_model
from data.grading.rubric import Rubric, RubricConfig
from data.grading.string_check import StringCheck, StringCheckConfig
from data.grading.text_similarity import TextSimilarity, TextSimilarityConfig
from data.grading.types import BaseGrader, Grader, GraderConfig

KINDS: dict[str, tuple[type[GraderConfig], type[BaseGrader[Any]] | None]] = {
    "string_check": (StringCheckConfig, StringCheck),
    "text_similarity": (TextSimilarityConfig, TextSimilarity),
    "rubric": (RubricConfig, Rubric),
    "dataset_label": (DatasetLabelConfig, DatasetLabel),
    "multi": (MultiConfig, None),
    "reward_model": (RewardModelConfig, None),
}
"""Configuration and class of each type; those without a class need more than their configuration."""
MAX_DEPTH = 4  # of `multi` inside `multi`


def make_grader(config: Mapping[str, Any], *, field: str = "grader", scorer: Scorer | None = None) -> Grader:
    """The grader a configuration describes; `field` names it in errors, `scorer` is the reward model at hand.

    Raises:
        InputError: an unknown type, a missing or unknown field, a template that names what there is not, a
            reward model that is not at hand.
    """
    return _make(config, field, 0, scorer)


def load_grader(path: Path) -> Grader:
    """The grader in a YAML (or JSON) file.

    Raises:
        InputError: unreadable, or not a grader.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = str(error).splitlines()[0]
        raise InputError("grader", str(path), f"cannot be read ({cause})", "mend the file") from None
    return make_grader(config, field=path.name)


def _make(config: Any, field: str, depth: int, scorer: Scorer | None) -> Grader:
    if not isinstance(config, Mapping):
        raise InputError(field, config, "must be a mapping", "write `type:` and its fields")
    kind = config.get("type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{field}.type", kind, f"must be one of {', '.join(KINDS)}", "name a known type")
    model, grader = KINDS[kind]
    try:
        parsed = model.model_validate(dict(config))
    except ValidationError as error:
        raise _input_error(error, field) from None
    if isinstance(parsed, RewardModelConfig):
        return reward_model(parsed, scorer, field)
    if not isinstance(parsed, MultiConfig):
        assert grader is not None
        return grader(parsed)
    if depth >= MAX_DEPTH:
        raise InputError(field, kind, f"is nested more than {MAX_DEPTH} deep", "flatten it")
    parts = parsed.graders.items()
    return Multi(parsed, {name: _make(part, f"{field}.graders.{name}", depth + 1, scorer) for name, part in parts})


def _input_error(error: ValidationError, field: str) -> InputError:
    problem = error.errors(include_url=False)[0]
    name = ".".join([field, *(str(part) for part in problem["loc"])])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return InputError(name, cause.value, cause.rule, cause.remedy)
    rule = problem["msg"].removeprefix("Value error, ")
    return InputError(name, problem["input"], rule[0].lower() + rule[1:], "mend the grader's configuration")
