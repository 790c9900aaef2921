"""The `rayloop` command: one table of sub-commands, each loaded only when it is called.

The other folders stand above this one, so they are named here as text and imported on use; that also
keeps `rayloop --help` quick.
"""

import importlib
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import click
import typer
from typer.core import TyperGroup
from typer.main import get_command

from cluster.errors import RayloopError

app = typer.Typer(no_args_is_help=True, add_completion=False)


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
    "import": Mount("data.cli", "Bring events in from a file or a table.", "import"),
    "audit": Mount("data.cli", "Describe a source before it is imported.", "audit"),
    "curate": Mount("data.cli", "Turn events into a dataset.", "curate"),
    "data": Mount("data.cli", "Datasets: validate, show."),
    "train": Mount("train.cli", "Fit a LoRA adapter to a dataset."),
    "register": Mount("train.cli", "Put a trained adapter or a base model into the registry.", "register"),
    "evaluate": Mount("train.evaluate.cli", "Run the suites and gates on a version.", "evaluate"),
    "compare": Mount("train.evaluate.cli", "Two versions side by side.", "compare"),
    "tune": Mount("tune.cli", "Sweep hyper-parameters."),
    "experiment": Mount("serve.experiments.cli", "Plan, list and read experiments."),
    "rollout": Mount("serve.rollout.cli", "Start, approve, freeze or roll back a rollout."),
    "jobs": Mount("cluster.commands", "Training jobs and their state.", "jobs"),
    "lineage": Mount("data.cli", "From a version to the feedback that made it.", "lineage"),
    "verify": Mount("data.cli", "Check the event log.", "verify"),
    "loop": Mount("cluster.commands", "Run the jobs of one turn of the loop.", "loop"),
    "submit": Mount("cluster.commands", "Send any of these commands to a Ray cluster as a job.", "submit"),
}


class LazyGroup(TyperGroup):
    """A click group that imports a sub-command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, imported only when it is about to run or to be described."""
        mount = COMMANDS.get(cmd_name)
        if mount is None:
            return None
        if ctx.resilient_parsing or _only_listing(ctx):
            return click.Command(cmd_name, help=mount.help)
        return load_command(mount)


def load_command(mount: Mount) -> click.Command:
    """The click command behind one row of the table."""
    group: Any = get_command(importlib.import_module(mount.module).app)
    if mount.name is None or not isinstance(group, click.Group):
        return group  # type: ignore[no-any-return]
    return group.commands[mount.name]


def _only_listing(ctx: click.Context) -> bool:
    """True while the top-level help is being written."""
    return not ctx._protected_args and not ctx.args


def main() -> None:
    """Entry point: one clear line and a non-zero exit for every deliberate error."""
    run_app(LazyGroup(name="rayloop", help="Makes a language-model agent better from its own traffic."))


def run_app(command: click.Command | typer.Typer) -> None:
    """Run a command line, printing deliberate errors on one line.

    Exit codes: 0 success, 1 failure, 2 wrong input, 130 interrupted.
    """
    runnable: Any = command
    try:
        runnable()
    except RayloopError as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
