"""Sends a command to a running Ray cluster as a Ray job, or writes it as a RayJob manifest.

The working tree travels as it is (`working_dir`), so the cluster runs what was edited here.
"""

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stamina
import yaml

from cluster.errors import InputError, RayloopError, UnavailableError

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
LEFT_AT_HOME = [
    ".venv",
    ".git",
    ".rayloop",
    "tests",
    "docs",
    "**/__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
]
"""Paths of the working tree that no job needs."""
START_S = 60.0  # how long a cluster's job agent may still be starting
RAYJOB = ROOT / "k8s" / "base" / "rayjob-train.yaml"


class RayJobFailedError(RayloopError):
    """A submitted job ended badly; the message carries its state."""


def entrypoint(arguments: Sequence[str]) -> str:
    """The shell line that runs `rayloop ARGUMENTS` on the cluster.

    Raises:
        InputError: no arguments, or a command nobody knows.
    """
    from cluster.cli import COMMANDS

    if not arguments or arguments[0] not in COMMANDS:
        named = arguments[0] if arguments else ""
        raise InputError("command", named, "must be a rayloop command", f"name one of {', '.join(COMMANDS)}")
    return "python -m cluster " + shlex.join(arguments)


def submit(
    arguments: Sequence[str],
    address: str,
    *,
    environment: dict[str, str],
    on_text: Callable[[str], None] | None,
) -> str:
    """Run `rayloop ARGUMENTS` on the cluster whose dashboard is at `address`; the job id.

    With `on_text` the job's output is passed on as it comes and the call returns when the job ended;
    without, it returns once the job is submitted.

    Raises:
        UnavailableError: nothing answers at `address`.
        RayJobFailedError: the job was waited for and did not succeed.
    """
    from ray.job_submission import JobSubmissionClient

    line = entrypoint(arguments)
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise UnavailableError(f"no Ray cluster answers at {address} ({cause}); see `rayloop status`") from None
    job_id = ""
    for attempt in stamina.retry_context(on=_is_starting, attempts=None, timeout=START_S, wait_max=2.0):
        with attempt:
            job_id = client.submit_job(
                entrypoint=line,
                runtime_env={"working_dir": str(ROOT), "excludes": LEFT_AT_HOME, "env_vars": environment},
                metadata={"command": " ".join(arguments)},
            )
    log.info("submitted %s as %s", line, job_id)
    if on_text is not None:
        _follow(client, job_id, on_text)
    return job_id


def _is_starting(error: Exception) -> bool:
    """A cluster that has just come up answers before its job agent does."""
    return isinstance(error, RuntimeError) and "No available agent" in str(error)


def _follow(client: Any, job_id: str, on_text: Callable[[str], None]) -> None:
    import asyncio

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            on_text(text)

    asyncio.run(tail())
    status, info = client.get_job_status(job_id), client.get_job_info(job_id)
    if str(status) != "SUCCEEDED":
        raise RayJobFailedError(f"job {job_id} ended as {status}: {(info.message or '').strip().splitlines()[-1:]}")


def rayjob_manifest(arguments: Sequence[str], name: str) -> str:
    """The command as a RayJob manifest, made from the one in `k8s/base`, for `kubectl apply -f -`."""
    manifest = yaml.safe_load(RAYJOB.read_text(encoding="utf-8"))
    manifest["metadata"]["name"] = name
    manifest["spec"]["entrypoint"] = entrypoint(arguments)
    return yaml.safe_dump(manifest, sort_keys=False)
