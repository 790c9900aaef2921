"""What a sweep varies: learning rate and KL coefficient first, then any field of a training's configuration.

A range is written `low:high` (drawn log-uniformly where both are above 0, whole numbers where both are
written as whole numbers), a choice `a,b,c`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError
from cluster.settings.training import SweepSettings


@dataclass(frozen=True)
class Range:
    """A number between two ends."""

    low: float
    high: float
    log: bool
    whole: bool = False


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]


Space = dict[str, Range | Choice]


def parse_dimension(field: str, text: str) -> Range | Choice:
    """The range or the choice that `text` writes.

    Raises:
        InputError: neither.
    """
    if ":" in text:
        low, _, high = text.partition(":")
        try:
            ends = float(low), float(high)
        except ValueError:
            ends = math.nan, math.nan
        if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
            raise InputError(field, text, "is not a range", "write low:high, for example 1e-5:1e-3")
        whole = low.strip().lstrip("+-").isdecimal() and high.strip().lstrip("+-").isdecimal()
        return Range(*ends, log=ends[0] > 0, whole=whole)
    values = tuple(_value(part) for part in text.split(",") if part.strip())
    if not values:
        raise InputError(field, text, "is empty", "write low:high or a,b,c")
    return Choice(values)


def default_space(settings: SweepSettings, *, learning_rate: float, beta: float | None) -> Space:
    """Ranges around the method's defaults; `beta` is left out where the method has none."""
    space: Space = {"learning_rate": _around(learning_rate, settings.learning_rate_spread)}
    if beta is not None:
        space["beta"] = _around(beta, settings.beta_spread)
    return space


def to_ray(space: Mapping[str, Range | Choice], *, grid: bool = False) -> dict[str, Any]:
    """The space as Ray Tune's own domains; `grid` walks through all choices.

    Raises:
        InputError: a grid over a range.
    """
    import ray.tune

    domains: dict[str, Any] = {}
    for name, dimension in space.items():
        if isinstance(dimension, Choice):
            values = list(dimension.values)
            domains[name] = ray.tune.grid_search(values) if grid else ray.tune.choice(values)
        elif grid:
            raise InputError(name, f"{dimension.low}:{dimension.high}", "is no grid", "write the values as a,b,c")
        elif dimension.whole:
            draw = ray.tune.lograndint if dimension.log else ray.tune.randint
            domains[name] = draw(int(dimension.low), int(dimension.high) + 1)
        else:
            draw = ray.tune.loguniform if dimension.log else ray.tune.uniform
            domains[name] = draw(dimension.low, dimension.high)
    return domains


def ends_of(dimension: Range | Choice) -> tuple[Any, ...]:
    """The lowest and the highest value that may be drawn, or all there are."""
    if isinstance(dimension, Choice):
        return dimension.values
    ends = dimension.low, dimension.high
    return (int(ends[0]), int(ends[1])) if dimension.whole else ends


def field_of(config: Mapping[str, Any], name: str) -> Any:
    """The value of a field of a configuration given as plain values; `lora.r` is field `r` of `lora`.

    Raises:
        KeyError: no such field.
    """
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[part]
    return value


def with_point(config: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with a point's values in place of its own."""
    merged = dict(config)
    for name, value in point.items():
        first, _, rest = name.partition(".")
        merged[first] = with_point(merged[first], {rest: value}) if rest else value
    return merged


def contains(space: Mapping[str, Range | Choice], point: Mapping[str, Any]) -> bool:
    """Whether a point lies in the space; a field without a value lies in no range."""
    return all(
        point[name] in d.values if isinstance(d, Choice) else point[name] is not None and d.low <= point[name] <= d.high
        for name, d in space.items()
    )


def _around(centre: float, spread: float) -> Range:
    return Range(centre / math.sqrt(spread), centre * math.sqrt(spread), log=True)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
