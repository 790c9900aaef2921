"""From a configuration to a grader."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.settings.engines import GraderSettings
from data.grading.dataset_label import DatasetLabel, DatasetLabelConfig
from data.grading.endpoint import judge_endpoint
from data.grading.judge import LabelModel, LabelModelConfig, ScoreModel, ScoreModelConfig
from data.grading.multi import Multi, MultiConfig
from data.grading.pair_model import PairModel, PairModelConfig
from data.grading.python_grader import PythonConfig, PythonGrader
from data.grading.reward_model import RewardModelConfig, Scorer, reward_model
from data.grading.rubric import Rubric, RubricConfig
from data.grading.string_check import StringCheck, StringCheckConfig
from data.grading.text_similarity import Cosine, TextSimilarity, TextSimilarityConfig
from data.grading.types import BaseGrader, Endpoint, Grader, GraderConfig

KINDS: dict[str, tuple[type[GraderConfig], type[BaseGrader[Any]] | None]] = {
    "string_check": (StringCheckConfig, StringCheck),
    "text_similarity": (TextSimilarityConfig, TextSimilarity),
    "rubric": (RubricConfig, Rubric),
    "dataset_label": (DatasetLabelConfig, DatasetLabel),
    "multi": (MultiConfig, None),
    "label_model": (LabelModelConfig, None),
    "score_model": (ScoreModelConfig, None),
    "pair_model": (PairModelConfig, None),
    "python": (PythonConfig, None),
    "reward_model": (RewardModelConfig, None),
}
"""Configuration and class of each type; those without a class need more than their configuration."""
MAX_DEPTH = 4  # of `multi` inside `multi`


@dataclass(frozen=True, slots=True)
class AtHand:
    """What graders may ask here, and how `python` graders are bounded."""

    scorer: Scorer | None = None
    """The reward model."""
    judge: Endpoint | None = None
    """Where `label_model`, `score_model`, `pair_model` and embeddings are asked."""
    embedding_model: str | None = None
    python_memory_mb: int = 256
    python_timeout_s: float = 10.0
    """For callers that set no deadline of their own."""

    @classmethod
    def of(cls, settings: GraderSettings, scorer: Scorer | None = None) -> "AtHand":
        """What the settings name; the judge's key comes from the environment."""
        return cls(
            scorer=scorer,
            judge=judge_endpoint(settings.judge_url, settings.judge_api_key_env, structured=settings.judge_structured),
            embedding_model=settings.embedding_model,
            python_memory_mb=settings.python_memory_mb,
        )


def make_grader(config: Mapping[str, Any], *, field: str = "grader", at_hand: AtHand = AtHand()) -> Grader:
    """The grader a configuration describes; `field` names it in errors.

    Raises:
        InputError: an unknown type, a missing or unknown field, a template that names what there is not, a
            model that is not at hand.
    """
    return _make(config, field, 0, at_hand)


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


def _make(config: Any, field: str, depth: int, at_hand: AtHand) -> Grader:
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
    if isinstance(parsed, MultiConfig):
        if depth >= MAX_DEPTH:
            raise InputError(field, kind, f"is nested more than {MAX_DEPTH} deep", "flatten it")
        parts = parsed.graders.items()
        return Multi(parsed, {name: _make(part, f"{field}.graders.{name}", depth + 1, at_hand) for name, part in parts})
    return _asking(parsed, field, at_hand) or _alone(grader, parsed)


def _alone(grader: type[BaseGrader[Any]] | None, config: GraderConfig) -> Grader:
    assert grader is not None, config
    return grader(config)


def _asking(config: GraderConfig, field: str, at_hand: AtHand) -> Grader | None:
    """A grader that needs something at hand; `None` for those that need only their configuration."""
    match config:
        case RewardModelConfig():
            return reward_model(config, at_hand.scorer, field)
        case PythonConfig():
            return PythonGrader(config, timeout_s=at_hand.python_timeout_s, memory_mb=at_hand.python_memory_mb)
        case LabelModelConfig():
            return LabelModel(config, _judge(at_hand, field))
        case ScoreModelConfig():
            return ScoreModel(config, _judge(at_hand, field))
        case PairModelConfig():
            return PairModel(config, _judge(at_hand, field))
        case TextSimilarityConfig(evaluation_metric="cosine"):
            model = at_hand.embedding_model
            if model is None:
                remedy = "set `grader.embedding_model`"
                raise InputError(f"{field}.evaluation_metric", "cosine", "has no embeddings to ask", remedy)
            return Cosine(config, _judge(at_hand, field), model)
    return None


def _judge(at_hand: AtHand, field: str) -> Endpoint:
    if at_hand.judge is None:
        raise InputError(f"{field}.type", "a model", "has no model to ask here", "set `grader.judge_url`")
    return at_hand.judge


def _input_error(error: ValidationError, field: str) -> InputError:
    problem = error.errors(include_url=False)[0]
    name = ".".join([field, *(str(part) for part in problem["loc"])])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return InputError(name, cause.value, cause.rule, cause.remedy)
    rule = problem["msg"].removeprefix("Value error, ")
    return InputError(name, problem["input"], rule[0].lower() + rule[1:], "mend the grader's configuration")
