"""Processes that begin with our modules loaded: forked from one that has done nothing but import them.

They have their own streams and signals and the environment of their caller, like those that `python -m` starts, without
its second of imports.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

LOADED = ("pytest", "cluster.commands", "data.cli", "data.outlets.cli", "serve.keys_cli", "serve.routes_cli")
"""What most commands need, pytest because every child looks for the main module of its parent; no torch and no Ray."""
TIMEOUT_S = 120.0

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(LOADED))


def start(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = os.environ
) -> ForkServerProcess:
    """Call a function of a module in a process of its own."""
    process = _server.Process(target=_begin, args=(dict(environment), os.getcwd(), function, arguments))
    process.start()
    return process


def _begin(environment: Mapping[str, str], folder: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ.clear()  # that of whoever came first is still there
    os.environ.update(environment)
    os.chdir(folder)
    function(*arguments)


def rayloop(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command line with additions to the environment, and what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        process = start(_command, streams, arguments, environment=os.environ | environment)
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, TIMEOUT_S)
        out, err = (stream.read_text(encoding="utf-8") for stream in streams)
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _command(streams: Sequence[Path], arguments: Sequence[str]) -> None:
    for number, stream in enumerate(streams, 1):
        redirect(number, stream)
    sys.argv = ["rayloop", *arguments]
    from cluster.cli import main

    main(arguments)


def redirect(number: int, file: Path) -> None:
    """Have a standard stream of this process written to a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, number)
    os.close(descriptor)
