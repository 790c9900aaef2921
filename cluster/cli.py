"""The `rayloop` command: one table of sub-commands, each loaded only when it is called.

The other folders stand above this one, so they are named here as text and imported on use; that also
keeps `rayloop --help` quick.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import typer

from cluster.errors import RayloopError
from cluster.interruption import terminated

TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Mount:
    """One sub-command: the module whose `app` holds it, its name there, and its line of help."""

    module: str
    help: str
    name: str | None = None
    """Name of the command in `module.app`; `None` mounts the whole app as a group."""


COMMANDS: dict[str, Mount] = {
    "demo": Mount("cluster.demo.cli", "Watch an agent get better from its own traffic, on this machine.", "demo"),
    "up": Mount("serve.cli", "Start the live side (router, engine, grader, control) on this machine.", "up"),
    "down": Mount("serve.cli", "Stop what `up` started.", "down"),
    "status": Mount("cluster.commands", "What runs, which flags are on, which version serves.", "status"),
    "config": Mount("cluster.commands", "The settings in force and where each came from.", "config"),
    "keys": Mount("serve.keys_cli", "Create, list and revoke API keys."),
    "route": Mount("serve.routes_cli", "Read or change a traffic split."),
    "prompt": Mount("data.prompts_cli", "The versioned prompts of agents, with what they must refuse."),
    "import": Mount("data.cli", "Bring events in from a file or a table.", "import"),
    "audit": Mount("data.cli", "Describe a source before it is imported.", "audit"),
    "curate": Mount("data.cli", "Turn events into a dataset.", "curate"),
    "data": Mount("data.cli", "Datasets: validate, show."),
    "train": Mount("train.cli", "Fit a LoRA adapter to a dataset."),
    "register": Mount("train.cli", "Put a trained adapter or a base model into the registry.", "register"),
    "evaluate": Mount("train.evaluate.cli", "Run the suites and gates on a version.", "evaluate"),
    "compare": Mount("train.evaluate.cli", "Two versions side by side.", "compare"),
    "export": Mount("train.export.cli", "Write a version as files that other tools load.", "export"),
    "tune": Mount("tune.cli", "Sweep hyper-parameters."),
    "experiment": Mount("serve.experiments.cli", "Plan, list and read experiments."),
    "rollout": Mount("serve.rollout.cli", "Start, approve, freeze or roll back a rollout."),
    "label": Mount("data.labelling.cli", "Answers that wait for people's judgement: look, judge, see who agrees."),
    "jobs": Mount("cluster.commands", "Training jobs and their state.", "jobs"),
    "lineage": Mount("data.cli", "From a version to the feedback that made it.", "lineage"),
    "erase": Mount("data.cli", "Remove a person from everything that was kept of them.", "erase"),
    "verify": Mount("serve.verify_cli", "Check the event log and rebuild every decision.", "verify"),
    "loop": Mount("cluster.commands", "Run the jobs of one turn of the loop.", "loop"),
    "notify": Mount("cluster.notify_cli", "Channels to people, and a test of them."),
    "outlets": Mount("data.outlets.cli", "Events that leave: webhooks, brokers, notifications."),
    "metrics": Mount("cluster.metrics_cli", "Serve the metrics of every process of this machine.", "metrics"),
    "submit": Mount("cluster.commands", "Send any of these commands to a Ray cluster as a job.", "submit"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: hand the rest of the line to the command it names, or say which there are."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    mount = COMMANDS.get(line[0]) if line else None
    if mount is None:
        run_app(_listing(), line, "rayloop")
    else:
        run_mounted(line[0], mount, line[1:])


def run_mounted(name: str, mount: Mount, rest: list[str]) -> None:
    """Import the module behind one row of the table and run it on the rest of the line."""
    app: typer.Typer = importlib.import_module(mount.module).app
    lone = len(app.registered_commands) == 1 and not app.registered_groups and app.registered_callback is None
    if mount.name is None or lone:
        run_app(app, rest, f"rayloop {name}")
    else:
        run_app(app, [mount.name, *rest], "rayloop")


class _OnlyJson(io.TextIOBase):
    """Standard output of a command asked for `--json`: its one object, and nothing else.

    Libraries print to it too (Ray does, from its own threads); whatever is not an object goes to standard
    error instead.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err

    def write(self, text: str) -> int:
        """`print` hands an object over in one piece."""
        if _is_object(text):
            self._out.write(text.rstrip("\n") + "\n")
            self._out.flush()
        elif text.strip():
            self._err.write(text if text.endswith("\n") else text + "\n")
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""
        self._err.flush()

    def isatty(self) -> bool:
        """Never drawn on."""
        return False


def _is_object(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _listing() -> typer.Typer:
    """A command line that only knows names and help: for `--help`, no arguments and misspellings."""
    listing = typer.Typer(no_args_is_help=True, add_completion=False)
    listing.callback(help="Makes a language-model agent better from its own traffic.")(lambda: None)
    for name, mount in COMMANDS.items():
        listing.command(name, help=mount.help)(lambda: None)
    return listing


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None, prog_name: str | None = None) -> None:
    """Run a command line, printing deliberate errors on one line.

    Exit codes: 0 success, 1 failure, 2 wrong input, 130 interrupted, 143 terminated.
    """
    line = list(sys.argv[1:] if arguments is None else arguments)
    terminated.clear()
    own = line[: line.index("--")] if "--" in line else line
    try:
        with contextlib.ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _terminated))
            if "--json" in own:
                stack.enter_context(contextlib.redirect_stdout(_OnlyJson(sys.stdout, sys.stderr)))
            app(args=line, prog_name=prog_name)
    except RayloopError as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as error:
        if terminated.is_set():
            error.code = TERMINATED
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _terminated(*_: object) -> None:
    """SIGTERM unwinds the stack, so that MLflow and the job table learn of the end."""
    terminated.set()
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    main()
