"""What a sweep may vary."""

import math

import pytest

from cluster.errors import InputError
from cluster.settings.training import SweepSettings
from tune.space import Choice, Range, contains, default_space, field_of, parse_dimension, to_ray, with_point


def test_a_range_is_logarithmic_where_it_can_be() -> None:
    assert parse_dimension("learning_rate", "1e-5:1e-3") == Range(1e-5, 1e-3, log=True)
    assert parse_dimension("dropout", "0:0.3") == Range(0.0, 0.3, log=False)
    assert parse_dimension("epochs", "1:4") == Range(1.0, 4.0, log=True, whole=True)


def test_fields_within_fields_are_named_with_a_dot() -> None:
    config = {"epochs": 1, "lora": {"r": 8, "alpha": 16}}
    assert (field_of(config, "lora.r"), field_of(config, "epochs")) == (8, 1)
    assert with_point(config, {"lora.r": 32, "epochs": 2}) == {"epochs": 2, "lora": {"r": 32, "alpha": 16}}
    assert config["lora"] == {"r": 8, "alpha": 16}
    for name in ("lora.rank", "epochs.r", "rank"):
        with pytest.raises(KeyError):
            field_of(config, name)


def test_a_choice_keeps_the_types_of_its_values() -> None:
    assert parse_dimension("batch_size", "8, 16,32") == Choice((8, 16, 32))
    assert parse_dimension("schedule", "linear,cosine") == Choice(("linear", "cosine"))


@pytest.mark.parametrize("text", ["", ",", "a:b", "1:", "3:1", "1:inf", "nan:1"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write"):
        parse_dimension("beta", text)


def test_default_space_is_centred_on_the_methods_defaults() -> None:
    space = default_space(SweepSettings(), learning_rate=1e-4, beta=0.1)
    rate = space["learning_rate"]
    assert isinstance(rate, Range) and rate.log
    assert rate.high / rate.low == pytest.approx(10) and math.sqrt(rate.high * rate.low) == pytest.approx(1e-4)
    assert list(default_space(SweepSettings(), learning_rate=1e-4, beta=None)) == ["learning_rate"]
    assert contains(space, {"learning_rate": 1e-4, "beta": 0.1})
    assert not contains(space, {"learning_rate": 1e-2, "beta": 0.1})


def test_ray_draws_inside_the_range() -> None:
    domains = to_ray({"a": Range(1e-5, 1e-3, log=True), "n": Range(1, 3, log=True, whole=True)})
    drawn = [domains["a"].sample() for _ in range(200)]
    assert all(1e-5 <= value <= 1e-3 for value in drawn)
    assert 0.35 < sum(value < 1e-4 for value in drawn) / 200 < 0.65  # half of a log-uniform draw
    assert {domains["n"].sample() for _ in range(100)} == {1, 2, 3}


def test_a_grid_needs_values() -> None:
    assert to_ray({"beta": Choice((0.1, 0.3))}, grid=True) == {"beta": {"grid_search": [0.1, 0.3]}}
    with pytest.raises(InputError, match="is no grid"):
        to_ray({"beta": Range(0.1, 0.3, log=True)}, grid=True)
