"""`rayloop evaluate` and `rayloop compare`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.logs import configure_logging
from cluster.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="Evaluate versions before any traffic reaches them.")

Config = Annotated[Path | None, typer.Option(help="Configuration file; rayloop.yaml by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DatasetOption = Annotated[str | None, typer.Option(help="Dataset id, hash, path or `latest`.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Held-out prompts answered at most.")]


@app.command()
def evaluate(
    version: Annotated[str, typer.Argument(help="Version (triage/3) or alias (triage@challenger).")],
    against: Annotated[str, typer.Option(help="Alias of the same model, or a version.")] = "champion",
    dataset: DatasetOption = None,
    suites: Annotated[Path | None, typer.Option(help="Folder with a team's own cases.")] = None,
    limit: Limit = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Run the suites and gates on a version. Exits with 1 when it does not pass."""
    settings, _ = load_settings(config, evaluation=_asked(suites=suites, max_prompts=limit))
    configure_logging(settings.logging)
    from train.evaluate.run import evaluate as run_evaluation

    found = run_evaluation(settings, version, against=against, dataset_ref=dataset)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        from rich.console import Console

        from train.evaluate.report import print_table

        print_table(found, Console())
        follow = f"rollout start {found.version}" if found.passed else f"compare {found.against} {found.version}"
        print(f"next: rayloop {follow}")
    raise typer.Exit(0 if found.passed else 1)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A version or alias.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    dataset: DatasetOption = None,
    limit: Limit = None,
    as_json: Json = False,
    config: Config = None,
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
