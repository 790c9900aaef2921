"""What is not sent to another endpoint; `tests/serve/finetuning/test_training.py` sends a dataset to ours."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.errors import DatasetError, InputError, NotFoundError
from cluster.jobs import Jobs
from cluster.settings import Settings
from data.manifest import load_manifest, write_manifest
from tests.datasets import write_feedback_dataset
from train.remote import RemoteRequest, train_remotely

NOBODY: Any = object()
"""A client that nothing is asked of."""


def test_another_agents_feedback_is_not_sent(settings: Settings, sqlite_database: Engine) -> None:
    write_feedback_dataset(settings.home / "datasets", users=10, agent="other")
    with pytest.raises(NotFoundError, match="'latest' names 0 datasets"):
        train_remotely(settings, sqlite_database, RemoteRequest(model="m", agent="triage"), NOBODY)


def test_a_result_that_could_not_be_registered_is_not_asked_for(settings: Settings, sqlite_database: Engine) -> None:
    with pytest.raises(InputError, match="model='my agent' must be letters"):
        train_remotely(settings, sqlite_database, RemoteRequest(model="m", agent="my agent"), NOBODY)


def test_a_dataset_in_which_somebody_was_erased_is_not_sent(settings: Settings, sqlite_database: Engine) -> None:
    made = write_feedback_dataset(settings.home / "datasets", users=10)
    folder = Path(str(made.path))
    write_manifest(folder, replace(load_manifest(folder), erased_rows=3))
    with pytest.raises(DatasetError, match=r"3 examples of .* were erased since it was made; run `rayloop curate`"):
        train_remotely(settings, sqlite_database, RemoteRequest(model="m", agent="triage"), NOBODY)
    assert Jobs(sqlite_database, settings.tenant, settings.workspace).list() == []
