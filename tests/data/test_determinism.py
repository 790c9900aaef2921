"""One dataset from one log: whatever the number of blocks, and with a worker killed in the middle."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray

from cluster.database import connect
from cluster.settings import Settings, load_settings
from data.curate import curate
from data.log import EventLog
from tests.data.traffic import traffic


@contextmanager
def a_worker_killed() -> Iterator[list[int]]:
    """Kills one worker of this Ray session while it runs a task of the pipeline; yields the ids of the killed."""
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        session = ray._private.worker._global_node.get_session_dir_path()
        while not over.is_set() and not killed:
            for process in psutil.process_iter(["pid", "name", "cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if "MapBatches" in title and title.startswith("ray::") and belongs(process, session):
                    process.kill()
                    killed.append(process.info["pid"])
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=hunt)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def belongs(process: psutil.Process, session: str) -> bool:
    """Whether a worker is one of the session: its raylet was started with the session's folder."""
    try:
        raylet = process.parent()
        return raylet is not None and session in " ".join(raylet.cmdline())
    except psutil.Error:
        return False


@pytest.mark.ray
@pytest.mark.slow
def test_blocks_and_a_killed_worker_change_nothing(ray_session: None, tmp_path: Path) -> None:
    settings: Settings = load_settings(
        home=tmp_path / "home", curation={"filter": {"min_answer_tokens": 2}, "log_to_mlflow": False}
    )[0]
    engine = connect(settings)
    EventLog(engine).append(traffic(600))
    engine.dispose()
    one = curate(settings, parallelism=1, out=tmp_path / "one")
    two = curate(settings, parallelism=2, out=tmp_path / "two")
    with a_worker_killed() as killed:
        eight = curate(settings, parallelism=8, out=tmp_path / "eight")
    assert killed, "no task of the pipeline was running when a worker was to be killed"
    assert one.dataset_hash == two.dataset_hash == eight.dataset_hash
    assert one.stages == two.stages == eight.stages
