"""`rayloop evaluate` and `rayloop compare`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import load_settings

if TYPE_CHECKING:
    from train.evaluate.types import Evaluation

app = typer.Typer(no_args_is_help=True, help="Evaluate versions before any traffic reaches them.")

DatasetOption = Annotated[str | None, typer.Option(help="Dataset id, hash, path or `latest`.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Held-out prompts answered at most.")]


@app.command()
def evaluate(
    versions: Annotated[list[str], typer.Argument(help="Versions (triage/3) or aliases (triage@challenger).")],
    against: Annotated[str, typer.Option(help="Alias of the same model, or a version.")] = "champion",
    dataset: DatasetOption = None,
    suites: Annotated[Path | None, typer.Option(help="Folder with a team's own cases.")] = None,
    limit: Limit = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Run the suites and gates on versions. Exits with 1 when one does not pass.

    The version they are compared with answers once. With --json several come as a list, `evaluations`.
    """
    settings, _ = load_settings(config, evaluation=_asked(suites=suites, max_prompts=limit))
    configure_logging(settings.logging)
    from train.evaluate.run import Known
    from train.evaluate.run import evaluate as run_evaluation

    known: Known = {}
    found = [run_evaluation(settings, ref, against=against, dataset_ref=dataset, known=known) for ref in versions]
    passed = all(each.passed for each in found)
    if as_json:
        shown = [each.to_json() for each in found]
        print(json.dumps(shown[0] if len(shown) == 1 else {"passed": passed, "evaluations": shown}))
    else:
        _show(found)
    raise typer.Exit(0 if passed else 1)


def _show(found: "Sequence[Evaluation]") -> None:
    from rich.console import Console

    from train.evaluate.report import print_table

    for each in found:
        print_table(each, Console())
        follow = f"rollout start {each.version}" if each.passed else f"compare {each.against} {each.version}"
        print(f"next: rayloop {follow}")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A version or alias.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    dataset: DatasetOption = None,
    limit: Limit = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Two versions side by side: gates, win rate, answers that differ, configurations, datasets."""
    settings, _ = load_settings(config, evaluation=_asked(max_prompts=limit))
    configure_logging(settings.logging)
    from train.evaluate.compare import compare as run_comparison
    from train.evaluate.compare import print_comparison

    found = run_comparison(settings, first, second, dataset_ref=dataset)
    if as_json:
        print(json.dumps(found))
    else:
        from rich.console import Console

        print_comparison(found, Console())
        print(f"next: rayloop evaluate {found['second']} --against {found['first']}")


def _asked(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
