"""How curation runs on Ray Data: what a task costs, and without the noise."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data

from cluster.runtime import RaySession
from cluster.settings import Settings
from data.exchange import Blocks

OPTIONS = {
    "enable_progress_bars": False,
    "target_max_block_size": None,
    "override_object_store_memory_limit_fraction": 1e6,
}
"""Of Ray Data's context while curation runs."""


def task_cpus(settings: Settings, session: RaySession) -> float:
    """Logical CPUs of one task: a core's share of a cluster that is here for curation alone, else the setting."""
    if not session.started:
        return settings.curation.stage_cpus
    return max(1.0, settings.ray.num_cpus / (os.cpu_count() or 1))


def map_blocks(blocks: Blocks, function: Callable[[pa.Table], pa.Table], num_cpus: float) -> list[Any]:
    """References to what a function makes of each block, in order; those without rows are left out.

    Begins when all blocks are there: a task that waits for one would hold a worker.
    """
    if not blocks:
        return []
    ray.wait(list(blocks), num_returns=len(blocks), fetch_local=False)
    # A reference inside of the function would keep its block until the whole job has ended.
    dataset = _dataset_of(blocks).map_batches(
        function, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, num_cpus=num_cpus
    )
    bundles = dataset.iter_internal_ref_bundles()
    return [block.ref for bundle in bundles for block in bundle.blocks if block.metadata.num_rows]


def _dataset_of(blocks: Blocks) -> ray.data.Dataset:
    """A dataset of finished blocks.

    What `ray.data.from_arrow_refs` makes, but for the task a block by which that asks for rows and schema: it wants a
    whole CPU, for which a cluster that serves may wait for ever, and brings blocks back from disk. Not public: Ray is
    pinned.
    """
    from ray.data._internal.logical.interfaces import LogicalPlan
    from ray.data._internal.logical.operators import FromArrow
    from ray.data._internal.stats import DatasetStats
    from ray.data.block import BlockMetadataWithSchema
    from ray.data.dataset import MaterializedDataset
    from ray.experimental import get_object_locations

    found = get_object_locations(list(blocks))
    sizes = [found[block]["object_size"] for block in blocks]
    some = 1  # rows of a block: it would share a task with the next one if it had none
    known = [BlockMetadataWithSchema(some, size, None) for size in sizes]
    context = ray.data.DataContext.get_current().copy()
    plan = LogicalPlan(FromArrow(list(blocks), known), context)
    return MaterializedDataset(plan, context, DatasetStats(metadata={}, parent=None))


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data without bars, with blocks that are never cut, since the rows of a key must stay together, and with as
    many tasks at once as there are CPUs: results are kept, on disk if need be, so that waiting makes no room for more.
    """
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in OPTIONS}
    loggers = {"ray.data": logging.ERROR, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name, value in OPTIONS.items():
            setattr(context, name, value)
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
