"""The options that commands of every folder share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", help="The rayloop.yaml to use.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
