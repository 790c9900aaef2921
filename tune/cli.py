"""`rayloop tune`: sweep hyper-parameters."""

import inspect
import json
import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="Sweep hyper-parameters.")


@app.callback()
def _group() -> None:
    """Keeps `run` a sub-command while it is the only one."""


@app.command()
def run(
    method: Annotated[str, typer.Option(help="sft, dpo, kto, grpo, reward or score_card.")] = "dpo",
    dataset: Annotated[str, typer.Option(help="Dataset id, hash, path or `latest`.")] = "latest",
    agent: Annotated[str | None, typer.Option(help="Whose latest dataset and champion.")] = None,
    base: Annotated[str | None, typer.Option(help="Version, path or hub id to start from.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Configurations that are tried.")] = None,
    learning_rate: Annotated[str | None, typer.Option(help="Range low:high or values a,b,c.")] = None,
    beta: Annotated[str | None, typer.Option(help="Range low:high or values a,b,c.")] = None,
    vary: Annotated[list[str] | None, typer.Option(help="field=low:high or field=a,b,c; repeatable.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of every trial.")] = None,
    grid: Annotated[bool, typer.Option(help="Try every combination of the given values.")] = False,
    scheduler: Annotated[
        str, typer.Option(help="asha stops worse trials, pbt has them copy better ones, or none.")
    ] = "asha",
    resume: Annotated[str | None, typer.Option(help="Id of an interrupted sweep.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Sweep learning rate, KL coefficient and other fields of a training."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    from tune.spec import new_sweep
    from tune.sweep import resume_sweep, run_sweep

    if resume:
        found = resume_sweep(settings, resume)
    else:
        ranges = {"learning_rate": learning_rate, "beta": beta, **_varied(vary or [])}
        sweep = new_sweep(
            settings,
            method=method,
            dataset=dataset,
            base=base,
            agent=agent,
            trials=trials,
            ranges={name: text for name, text in ranges.items() if text is not None},
            overrides={"epochs": epochs} if epochs is not None else {},
            grid=grid,
            scheduler=scheduler,
        )
        found = run_sweep(settings, sweep)
    _print(found, as_json)


def _print(found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_json()))
        return
    from rich.console import Console

    from tune.report import print_sweep

    print_sweep(found.trials, found.chosen, found.axes, Console())
    print(f"sweep {found.sweep_id}, MLflow run {found.run_id}, {found.seconds:.0f} s")
    if found.chosen:
        point = {**found.shared, **found.chosen.config}
        print(f"next: {training_command(found.method, found.dataset_id, found.base, point)}")


def training_command(method: str, dataset_id: str, base: str, point: Mapping[str, Any]) -> str:
    """The command that trains from the same start with a point's values; what is no option goes by the environment."""
    from train.cli import run as train_run
    from train.config import setting_of

    known = inspect.signature(train_run).parameters
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in point.items()}
    options = [f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in shown.items() if name in known]
    variables = [
        f"RAYLOOP_{setting_of(method, name).upper().replace('.', '__')}={shlex.quote(text)}"
        for name, text in shown.items()
        if name not in known
    ]
    command = f"rayloop train run --method {method} --dataset {dataset_id} --base {shlex.quote(base)}"
    return " ".join([*variables, command, *options])


def _varied(texts: list[str]) -> dict[str, str]:
    varied = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if not separator or not name or not values:
            raise InputError("vary", text, "is not field=values", "write for example lora.r=8,16 or epochs=1:3")
        varied[name] = values
    return varied
