"""Strings jobs together: each is a command of the other folders, run as a process of its own.

A job is known by its command line and answers with one JSON object (`--json`), so this module needs no
import of the folders that stand above it, and the same line can be sent to a cluster with
`rayloop submit`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import RayloopError

ROOT = Path(__file__).parents[1]


class JobError(RayloopError):
    """A job's command failed; the message carries its own last line."""


def run_command(
    arguments: Sequence[str],
    *,
    config: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
    accepted: Collection[int] = (0,),
) -> dict[str, Any]:
    """Run `rayloop ARGUMENTS --json` to its end and return its result.

    Lines of its standard error (progress) go to `on_line` as they come. An interrupt is passed on: the
    child belongs to the same foreground group. `environment` is added to this process's own.

    Raises:
        JobError: its exit code is not an `accepted` one, or it printed no JSON.
    """
    line = [sys.executable, "-m", "cluster", *arguments, "--json"]
    if config is not None:
        line += ["--config", str(config)]
    tail: list[str] = []
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as answer,  # a pipe nobody reads yet would fill up
        subprocess.Popen(
            line,
            env={**os.environ, **path, **(environment or {})},
            stdout=answer,
            stderr=subprocess.PIPE,
            text=True,
        ) as child,
    ):
        assert child.stderr is not None
        for text in child.stderr:
            tail = [*tail[-19:], text.rstrip()]
            if on_line is not None:
                on_line(text.rstrip())
        child.wait()
        answer.seek(0)
        output = answer.read()
    name = " ".join(arguments[:2])
    result = _parsed(output)
    if child.returncode not in accepted or (child.returncode and result is None):
        raise JobError(f"`rayloop {name}` exited with {child.returncode}: {_last_error(tail)}")
    if result is None:
        raise JobError(f"`rayloop {name}` printed no JSON: {output[:200]!r}")
    return result


def _parsed(output: str) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        return None
    return result


def _last_error(tail: Sequence[str]) -> str:
    errors = [line for line in tail if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else (tail[-1] if tail else "no message")
