"""How curation runs on Ray Data: what a task costs, and without the noise."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray.data

from cluster.runtime import RaySession
from cluster.settings import Settings


def task_cpus(settings: Settings, session: RaySession) -> float:
    """Logical CPUs of one task: a core's share of a cluster that is here for curation alone, else the setting."""
    if not session.started:
        return settings.curation.stage_cpus
    return max(1.0, settings.ray.num_cpus / (os.cpu_count() or 1))


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data without bars, and with blocks that are never cut: the rows of a key must stay together."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.target_max_block_size
    loggers = {"ray.data": logging.ERROR, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in loggers}
    context.enable_progress_bars, context.target_max_block_size = False, None
    try:
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        context.enable_progress_bars, context.target_max_block_size = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
