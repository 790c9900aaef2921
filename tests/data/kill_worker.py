"""Kills a worker of a Ray session in the middle of its work."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray


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
