"""`rayloop demo`: watch an agent get better from its own traffic, on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.options import JsonOption

if TYPE_CHECKING:
    from cluster.demo.report import Findings

app = typer.Typer(no_args_is_help=True, add_completion=False)

INCONCLUSIVE = 3


@app.callback()
def _group() -> None:
    """Keeps `demo` a sub-command while it is the only one."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Of the base, the alerts, the analysts and the trainings.")] = 0,
    shuffle_feedback: Annotated[
        bool,
        typer.Option("--shuffle-feedback", help="Every reaction belongs to another alert: nothing may be promoted."),
    ] = False,
    home: Annotated[Path, typer.Option(help="Folder of the demo; made afresh.")] = Path(".rayloop/demo"),
    keep_up: Annotated[bool, typer.Option("--keep-up/--no-keep-up", help="Leave the live side running.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller numbers, for CI.")] = False,
    json_output: JsonOption = False,
) -> None:
    """An alert-triage agent learns from simulated analysts and is promoted; a damaged one is rolled back."""
    from cluster.demo.plan import QUICK, DemoPlan
    from cluster.demo.report import outcome
    from cluster.demo.run import run_demo
    from cluster.demo.story import Story

    given: dict[str, Any] = {"seed": seed, "shuffle_feedback": shuffle_feedback, "keep_up": keep_up}
    given |= QUICK if quick else {}
    story = Story()
    found, paths = run_demo(DemoPlan(**given), home, story)
    if json_output:
        print(json.dumps(found.summary()))
    else:
        _show(found, paths, story, outcome(found))
    raise typer.Exit(exit_code(found))


def exit_code(found: "Findings") -> int:
    """0 when it ended as it should: promoted and the damaged version caught, or, on shuffled feedback, nothing
    promoted. Else 3: every part worked, but the statistics of this seed decided otherwise."""
    return INCONCLUSIVE if found.inconclusive else 0


def _show(found: Any, paths: dict[str, Path], story: Any, outcome: str) -> None:
    """The table, where the time went, and what to look at."""
    from rich.markup import escape
    from rich.table import Table

    from cluster.demo.report import sections

    for title, rows in sections(found):
        table = Table(*map(escape, rows[0]), title=title, title_justify="left", title_style="bold", pad_edge=False)
        for row in rows[1:]:
            table.add_row(*map(escape, row))
        story.console.print("", table)
    config = paths["md"].parent / "rayloop.yaml"
    print(f"\n{outcome}\n{found.simulated}\n\nreport: {paths['html']}")
    if found.urls:
        print(f"next: rayloop rollout list --config {config}    (end it with: rayloop down --config {config})")
    else:
        print(f"next: rayloop up --mlflow --config {config}")
