"""What is swept: a method over a space, on one dataset from one start; kept as a file from which it resumes."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cluster.errors import InputError, NotFoundError
from cluster.settings import Settings
from train.files import write_file
from tune.space import Choice, Range, Space, default_space, ends_of, field_of, parse_dimension, with_point

if TYPE_CHECKING:
    from train.config import TrainConfig

SPEC = "sweep.json"
SCHEDULERS = ("asha", "pbt", "none")
SHARED = ("method", "base_model", "init_adapter", "dataset", "prompt", "out", "weights")
"""Fields that all trials have in common: what they are compared on, and where they are."""
MUTABLE = ("learning_rate", "beta", "sft_weight", "weight_decay")
"""What a population may change on the way: fields that say how to learn, not what is learned."""


@dataclass(frozen=True)
class Sweep:
    """What is swept; kept in the sweep's folder so that it can be resumed."""

    sweep_id: str
    method: str
    dataset: str
    base: str
    """Version, path or hub id the trainings start from; empty until `pin`: the base of the agent's champion."""
    trials: int
    space: Space
    agent: str | None = None
    """Whose latest dataset, champion and prompt; where it is not named, the dataset's."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the training's configuration that are the same in every trial."""
    grid: bool = False
    scheduler: str = "asha"
    run_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        space = {name: {"kind": type(d).__name__, **d.__dict__} for name, d in self.space.items()}
        return {**self.__dict__, "space": space}


def new_sweep(
    settings: Settings,
    *,
    method: str,
    dataset: str,
    base: str | None = None,
    agent: str | None = None,
    trials: int | None = None,
    ranges: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    grid: bool = False,
    scheduler: str = "asha",
) -> Sweep:
    """A sweep over the default ranges, with those in `ranges` (field to text) instead or beside.

    Raises:
        InputError: an unknown method, field or scheduler, a range that is none or holds what a training does not take,
            a rank no engine loads, or trials that leave whole models.
    """
    from train.config import resolve_config

    base = "" if base is None else base
    resolved = resolve_config(
        settings, method, base_model=base, dataset=Path(dataset), out=Path("unused"), **(overrides or {})
    )
    if resolved.weights == "full":
        rule = "cannot be swept: trials are measured as adapters of one base"
        raise InputError("training.weights", resolved.weights, rule, "sweep lora, or train with --weights full")
    space: Space = (
        {} if grid else default_space(settings.sweep, learning_rate=resolved.learning_rate, beta=resolved.beta)
    )
    for name, text in (ranges or {}).items():
        space[name] = parse_dimension(name, text)
        _check_dimension(settings, resolved, name, space[name], alone=len(ranges or {}) == 1)
    if scheduler not in SCHEDULERS:
        raise InputError("scheduler", scheduler, f"must be one of {', '.join(SCHEDULERS)}", "choose one of them")
    if scheduler == "pbt" and not set(space) & set(MUTABLE):
        raise InputError("scheduler", scheduler, f"needs one of {', '.join(MUTABLE)} to change", "vary it as well")
    return Sweep(
        sweep_id=f"{method}-{uuid.uuid4().hex[:8]}",
        method=method,
        dataset=dataset,
        base=base,
        trials=trials or settings.sweep.trials,
        space=space,
        agent=agent,
        overrides=dict(overrides or {}),
        grid=grid,
        scheduler=scheduler,
    )


def _check_dimension(
    settings: Settings, config: "TrainConfig", name: str, dimension: Range | Choice, *, alone: bool
) -> None:
    """Refuse what no trial could train with: the ends of a range, and each value of a choice, are tried.

    A rule over several fields counts where this one is varied alone: other values of others might keep it.
    """
    from train.config import TrainConfig, broken_rule, check_rank

    plain = config.model_dump(mode="json")
    try:
        own = field_of(plain, name)
    except KeyError:
        raise InputError(name, name, "is no field of a training", "see `training` in docs/configuration.md") from None
    if name in SHARED or (name == "beta" and config.beta is None):
        rule = f"has no meaning for {config.method}" if name == "beta" else "is the same for all trials of a sweep"
        raise InputError(name, ends_of(dimension), rule, "leave it out")
    if isinstance(dimension, Range) and not dimension.whole and type(own) is int:
        raise InputError(name, ends_of(dimension), "takes whole numbers", "write both ends as whole numbers")
    for value in ends_of(dimension):
        try:
            made = TrainConfig.model_validate(with_point(plain, {name: value}))
        except ValidationError as error:
            if alone or error.errors()[0]["loc"]:
                raise broken_rule(error, config.method) from None
            continue
        check_rank(settings, made)


def read_sweep(settings: Settings, sweep_id: str) -> Sweep:
    """A sweep from its folder.

    Raises:
        NotFoundError: no such sweep; the message names those there are.
    """
    file = sweep_folder(settings, sweep_id) / SPEC
    if not file.is_file():
        root = settings.home / "sweeps"
        known = sorted(path.parent.name for path in root.glob(f"*/{SPEC}")) if root.is_dir() else []
        raise NotFoundError(f"no sweep {sweep_id!r}; there are {', '.join(known) or 'none'}")
    values = json.loads(file.read_text())
    space = {name: _dimension(fields) for name, fields in values.pop("space").items()}
    return Sweep(**values, space=space)


def write_sweep(settings: Settings, sweep: Sweep) -> None:
    """Make the sweep's folder, and write down what is swept."""
    folder = sweep_folder(settings, sweep.sweep_id)
    folder.mkdir(parents=True)
    write_file(folder / SPEC, json.dumps(sweep.to_json(), indent=2))


def sweep_folder(settings: Settings, sweep_id: str) -> Path:
    """Where a sweep keeps everything."""
    return settings.home / "sweeps" / sweep_id


def _dimension(fields: dict[str, Any]) -> Range | Choice:
    if fields.pop("kind") == "Choice":
        return Choice(tuple(fields["values"]))
    return Range(**fields)
