"""`rayloop export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Write a version as files that other tools load.")


@app.command()
def export(
    version: Annotated[str, typer.Argument(help="Version (triage/3) or alias (triage@champion).")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced when the export is whole.")],
    kind: Annotated[str, typer.Option("--to", help="hf (the adapter), merged, gguf or ollama.")] = "merged",
    quantisation: Annotated[str | None, typer.Option(help="GGUF: auto, f32, f16, bf16 or q8_0.")] = None,
    adapter: Annotated[bool | None, typer.Option(help="Ollama: base and adapter apart, where it can.")] = None,
    create: Annotated[str | None, typer.Option(metavar="NAME", help="Also create the model in ollama.")] = None,
    push: Annotated[bool, typer.Option("--push", help="And push it.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as an adapter, merged weights, a GGUF file or an Ollama model, and check it."""
    if (create or push) and kind != "ollama":
        raise InputError("create", create, "goes with --to ollama", "add it")
    if push and not create:
        raise InputError("push", push, "needs a name", "add --create NAME")
    asked = {"quantisation": quantisation, "ollama_adapter": adapter}
    settings, _ = load_settings(config, export={name: value for name, value in asked.items() if value is not None})
    configure_logging(settings.logging)
    from train.export.run import create_in_ollama
    from train.export.run import export as write

    found = write(settings, version, kind, out)
    if create:
        create_in_ollama(out, create, push=push)
    whose = "the engine's" if found.by_engine else "those of base and adapter"
    checked = f", {found.identical} of {found.prompts} answers are {whose}" if found.prompts else ""
    print(json.dumps(found.to_json()) if as_json else f"{found.version} as {kind} in {out}{checked}")
