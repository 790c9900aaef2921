"""`rayloop train`: the offline base model, and LoRA adapters from datasets."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.logs import configure_logging
from cluster.settings import load_settings
from train.answers import generate

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fit a LoRA adapter to a dataset.")

app.command("generate")(generate)

Config = Annotated[Path | None, typer.Option("--config", help="rayloop.yaml to use.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def train() -> None:
    """Fit a LoRA adapter to a dataset."""


@app.command("toy")
def toy(
    examples: Annotated[Path, typer.Option(help='JSON lines of {"messages": [...]}.')],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    epochs: Annotated[float | None, typer.Option(help="Passes over the examples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Train a small base model from scratch on chat examples."""
    chosen = {k: v for k, v in {"epochs": epochs, "seed": seed}.items() if v is not None}
    settings, _ = load_settings(config, training={"toy": chosen})
    configure_logging(settings.logging)
    from train.toy import build_toy_base, read_examples

    result = build_toy_base(out, read_examples(examples), settings.training.toy)
    report = {
        "path": str(result.path.resolve()),
        "parameters": result.parameters,
        "examples": result.examples,
        "steps": result.steps,
        "loss": round(result.loss, 4),
        "seconds": round(result.seconds, 2),
    }
    human = f"{result.parameters:,} parameters, loss {result.loss:.3f}, {result.seconds:.0f} s, in {out}"
    _print(report, f"{human}\nnext: rayloop register MODEL --base {out}", as_json)


def _print(report: dict[str, Any], human: str, as_json: bool) -> None:
    print(json.dumps(report) if as_json else human)
