import importlib
import importlib.util

import pytest

from train.imports import hidden


def test_hidden_packages_cannot_be_found_until_the_block_ends() -> None:
    with hidden(("this",)):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("this")
    assert importlib.util.find_spec("this") is not None


def test_packages_that_are_loaded_stay() -> None:
    with hidden(("json",)):
        assert importlib.import_module("json").loads("1") == 1
