"""What is swept: a method over a space, on one dataset from one start; kept as a file from which it resumes."""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import InputError, NotFoundError
from cluster.settings import Settings
from train.files import write_file
from tune.space import Choice, Range, Space, default_space, field_of, highest_of, parse_dimension

SPEC = "sweep.json"
SCHEDULERS = ("asha", "pbt", "none")
MUTABLE = ("learning_rate", "beta", "sft_weight", "weight_decay")
"""What a population may change on the way: fields that say how to learn, not what is learned."""


@dataclass(frozen=True)
class Sweep:
    """What is swept; kept in the sweep's folder so that it can be resumed."""

    sweep_id: str
    method: str
    dataset: str
    base: str
    """Version or path the trainings start from."""
    trials: int
    space: Space
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
    base: str,
    trials: int | None = None,
    ranges: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    grid: bool = False,
    scheduler: str = "asha",
) -> Sweep:
    """A sweep over the default ranges, with those in `ranges` (field to text) instead or beside.

    Raises:
        InputError: an unknown method, field or scheduler, a range that is none, or a rank no engine loads.
    """
    from train.config import check_rank, resolve_config

    resolved = resolve_config(settings, method, base_model=base, dataset=Path(dataset), out=Path("unused"))
    asked = {name: parse_dimension(name, text) for name, text in (ranges or {}).items()}
    _check_fields(asked, resolved.model_dump(mode="json"))
    space: Space = (
        {} if grid else default_space(settings.sweep, learning_rate=resolved.learning_rate, beta=resolved.beta)
    )
    space |= asked
    if "lora.r" in asked:
        highest = resolved.lora.model_copy(update={"r": highest_of(asked["lora.r"])})
        check_rank(settings, resolved.model_copy(update={"lora": highest}))
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
        overrides=dict(overrides or {}),
        grid=grid,
        scheduler=scheduler,
    )


def _check_fields(names: Iterable[str], config: Mapping[str, Any]) -> None:
    for name in names:
        try:
            field_of(config, name)
        except KeyError:
            raise InputError(
                name, name, "is no field of a training", "see `training` in docs/configuration.md"
            ) from None


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
