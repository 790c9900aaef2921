"""Datasets in MLflow: a run of each, with its card, plots and numbers."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import tracking
from cluster.errors import UnavailableError
from cluster.settings import Settings
from data.manifest import Manifest

log = logging.getLogger(__name__)


def log_to_mlflow(settings: Settings, written: Manifest) -> None:
    """Log a dataset as an MLflow run with its card, plots and numbers, once for each dataset.

    Without MLflow the dataset is whole all the same, so that is a warning.
    """
    tags = {"rayloop.kind": "dataset", "rayloop.dataset_id": written.dataset_id}
    try:
        client, experiment = tracking.client(settings), tracking.experiment_id(settings)
        wanted = f"tags.`rayloop.dataset_id` = '{written.dataset_id}'"
        if client.search_runs([experiment], wanted, max_results=1):
            return
        with tracking.run(settings, f"dataset {written.dataset_id}", tags=tags) as run:
            run.log_dataset(name=written.dataset_id, digest=written.dataset_hash, uri=written.path, context="curation")
            run.log_metrics({f"{k}.{s}": n for k, splits in written.counts.items() for s, n in splits.items()})
            for file in ("manifest.json", "card.md", *sorted(p.name for p in Path(written.path).glob("*.png"))):
                run.log_artifact(Path(written.path) / file)
    except UnavailableError as error:
        log.warning("dataset %s is not in MLflow: %s", written.dataset_id, error)


@contextmanager
def mlflow_warming_up(settings: Settings) -> Iterator[None]:
    """MLflow is imported and its database opened while Ray works; that it cannot be is told when it is needed."""

    def warm_up() -> None:
        with suppress(UnavailableError):
            tracking.client(settings)

    with ThreadPoolExecutor(1, "mlflow") as beside:
        if settings.curation.log_to_mlflow:
            beside.submit(warm_up)
        yield
