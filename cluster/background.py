"""Commands of ours that outlive the process that started them, ended by their own process id."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.errors import UnavailableError

ROOT = Path(__file__).parents[1]
KEPT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED")
DROPPED = ("RAY_", "RAYLOOP_", "OMP_NUM_THREADS")
"""What a Serve replica has in its environment for itself. Our own settings are handed over in a file."""
DETACH = 'nohup "$@" >>"$LOG" 2>&1 </dev/null & echo $!'
"""The shell ends at once, so the command belongs to nobody: a worker's end takes its children with it."""


def start_detached(arguments: Sequence[str], log_file: Path) -> int:
    """Run `rayloop ARGUMENTS` by itself, in a session of its own; its process id.

    Raises:
        UnavailableError: it cannot be started.
    """
    command = ["/bin/sh", "-c", DETACH, "sh", sys.executable, "-m", "cluster", *arguments]
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        started = subprocess.run(
            command, env=_environment(log_file), capture_output=True, text=True, check=True, start_new_session=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"no process can be started for a job ({error})") from None
    return int(started.stdout)


def _environment(log_file: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith(DROPPED)}
    if not environment.get("CUDA_VISIBLE_DEVICES", "all"):  # Ray hides every GPU from a replica without one
        del environment["CUDA_VISIBLE_DEVICES"]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return environment | {"PYTHONPATH": path, "LOG": str(log_file)}


def find_process(pid: int, created: float) -> psutil.Process | None:
    """The process, unless it ended and its number went to another."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None


def ask_to_end(process: psutil.Process) -> None:
    """SIGTERM: a job's process then records where it stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()


def kill_family(process: psutil.Process) -> None:
    """SIGKILL, to the process and what it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def last_line(log_file: Path, limit: int = 300) -> str:
    """The last thing a process wrote, for messages."""
    try:
        lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip()[:limit] if lines else ""
