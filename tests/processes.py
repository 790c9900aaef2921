"""Processes that begin with our modules loaded: forked from one that has done nothing but import them.

They have their own environment, streams and signals like those that `python -m` starts, without its second of imports.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

LOADED = ("pytest", "cluster.commands", "data.cli", "data.outlets.cli", "serve.keys_cli", "serve.routes_cli")
"""What most commands need, pytest because every child looks for the main module of its parent; no torch and no Ray."""
TIMEOUT_S = 120.0

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(list(LOADED))


def rayloop(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command line with additions to the environment, and what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        process = fork.Process(target=_run, args=(arguments, os.environ | environment, streams))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, TIMEOUT_S)
        out, err = (stream.read_text(encoding="utf-8") for stream in streams)
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _run(arguments: Sequence[str], environment: Mapping[str, str], streams: Sequence[Path]) -> None:
    for number, stream in enumerate(streams, 1):
        redirect(number, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["rayloop", *arguments]
    from cluster.cli import main

    main(arguments)


def redirect(number: int, file: Path) -> None:
    """Have a standard stream of this process written to a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, number)
    os.close(descriptor)
