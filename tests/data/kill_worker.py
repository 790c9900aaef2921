"""Kills workers of a Ray session in the middle of their work."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray

TASKS = {"stage": "MapBatches", "exchange": "ray::_c"}
"""Kinds of task of the pipeline, and what is in the titles of processes that run them."""


@contextmanager
def workers_killed() -> Iterator[dict[str, int]]:
    """Kills one worker of this Ray session for each kind of task while it runs one; yields kind -> process killed."""
    killed: dict[str, int] = {}
    over = threading.Event()

    def hunt() -> None:
        session = ray._private.worker._global_node.get_session_dir_path()
        while not over.is_set() and len(killed) < len(TASKS):
            for process in psutil.process_iter(["pid", "name", "cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                kind = next((kind for kind, mark in TASKS.items() if mark in title and kind not in killed), None)
                if kind is not None and title.startswith("ray::") and belongs(process, session):
                    process.kill()
                    killed[kind] = process.info["pid"]
                    break
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
