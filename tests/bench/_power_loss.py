"""SQLite after a loss of power, played out: only fsynced bytes are kept (`fsynced.c`)."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.database import connect
from cluster.settings import load_settings
from data.log import EventLog
from tests.data.appender import ITEMS, THREADS
from tests.data.kill_cycles import ROOT

SOURCE = Path(__file__).with_name("fsynced.c")


def lost_without_power(seconds: float, *, careless: bool = False) -> tuple[int, int]:
    """Acknowledged events of one appender, and how many of them its fsynced bytes lack.

    `careless`: SQLite is told not to fsync, which must be seen to lose events.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written, kept = folder / "written", folder / "kept"
        written.mkdir()
        library = folder / "fsynced.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"], check=True)
        connect(load_settings(home=folder, database={"url": f"sqlite:///{written / 'log.db'}"})[0]).dispose()
        shutil.copytree(written, kept)
        told = _append(written, kept, library, folder / "acknowledged", seconds, careless)
        engine = connect(load_settings(home=folder, database={"url": f"sqlite:///{kept / 'log.db'}"})[0])
        stored = {recorded.event.event_id for recorded in EventLog(engine).scan(page=5000)}
        engine.dispose()
    acknowledged = {f"{client}-{body}-{item}" for client, body in told for item in range(ITEMS)}
    return len(acknowledged), len(acknowledged - stored)


def _append(
    written: Path, kept: Path, library: Path, out: Path, seconds: float, careless: bool
) -> set[tuple[str, str]]:
    environment = {**os.environ, "LD_PRELOAD": str(library), "FSYNCED_FROM": str(written), "FSYNCED_TO": str(kept)}
    url = f"sqlite:///{written / 'log.db'}"
    module = "tests.data.appender" if not careless else "tests.bench._careless_appender"
    command = [sys.executable, "-m", module, url, json.dumps([0] * THREADS), "power"]
    with out.open("wb") as stdout:
        child = subprocess.Popen(command, stdout=stdout, cwd=ROOT, env=environment)
        while not out.stat().st_size and child.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        child.kill()
        child.wait()
    lines = (line.split() for line in out.read_text().split("\n")[1:-1])
    return {(client, body) for client, body, _ in lines}
