"""Commands about the whole: `config`, `status`, `jobs`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from cluster.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="The rayloop.yaml to use.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

SECRET_WORDS = ("secret", "password", "token", "key")


@app.command()
def config(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """The settings in force and where each came from."""
    settings, origin = load_settings(config)
    rows = list(_flatten(settings))
    if json_output:
        print(
            json.dumps(
                {name: {"value": value, "origin": origin.get(name, "default")} for name, value in rows},
                default=str,
            )
        )
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value!s:<32}  {origin.get(name, 'default')}")


def _flatten(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, _shown(name, value)))
    return rows


def _shown(name: str, value: Any) -> Any:
    """The value, or stars where it is a secret; passwords inside database URLs are hidden too."""
    if value is None:
        return None
    if any(word in name.split("_") for word in SECRET_WORDS):
        return "***"
    if name == "url" and "@" in str(value):
        import sqlalchemy as sa

        return sa.make_url(str(value)).render_as_string(hide_password=True)
    return value


def flags(settings: Settings) -> dict[str, bool]:
    """Every switch of the configuration, by its dotted name."""
    names = [
        (s, f)
        for s in ("learning", "capture", "feedback", "automation")
        for f in type(getattr(settings, s)).model_fields
    ]
    return {f"{section}.{field}": getattr(getattr(settings, section), field) for section, field in names}
