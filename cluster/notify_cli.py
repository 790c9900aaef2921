"""`rayloop notify`: the channels to people, and a test of them."""

import json
from typing import Annotated

import typer

from cluster.clock import now_us
from cluster.errors import ConfigError, InputError, NotFoundError, UnavailableError
from cluster.notify import messenger, trial_notice
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings
from cluster.settings.outlets import AnyChannel, Severity
from cluster.webhook import DeliveryError

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command()
def test(
    channel: Annotated[list[str] | None, typer.Argument(help="Channels to test; all where none is named.")] = None,
    severity: Annotated[
        str | None, typer.Option(help="page, ticket or success; the most urgent a channel takes where absent.")
    ] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Send a test notification and say what each channel made of it; fails when one does."""
    settings, _ = load_settings(config)
    chosen = _chosen(settings, channel or [])
    results = {name: _try(chosen[name], _severity(chosen[name], severity)) for name in chosen}
    if json_output:
        print(json.dumps({"channels": results}))
    else:
        for name, failure in results.items():
            print(f"{name:<20} {'sent' if failure is None else failure}")
    failed = [name for name, failure in results.items() if failure is not None]
    if failed:
        raise UnavailableError(f"{len(failed)} of {len(results)} channels failed: {', '.join(failed)}")


@app.command("list")
def list_command(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """The channels and what each is sent."""
    settings, _ = load_settings(config)
    rows = [
        {"name": name, "type": channel.type, "severities": list(channel.severities)}
        for name, channel in settings.notifications.channels.items()
    ]
    if json_output:
        print(json.dumps({"channels": rows}))
        return
    for row in rows:
        print(f"{row['name']:<20} {row['type']:<10} {', '.join(row['severities'])}")
    print("next: rayloop notify test" if rows else "no channels; see docs/notifications.md")


def _chosen(settings: Settings, names: list[str]) -> dict[str, AnyChannel]:
    known = settings.notifications.channels
    if not known:
        raise NotFoundError("no channel is configured; set `notifications.channels` in rayloop.yaml")
    for name in names:
        if name not in known:
            raise InputError("CHANNEL", name, f"must be one of {', '.join(known)}", "name a configured channel")
    return {name: known[name] for name in names or known}


def _severity(channel: AnyChannel, asked: str | None) -> Severity:
    severities: tuple[Severity, ...] = ("page", "ticket", "success")
    if asked is None:
        return next((s for s in severities if s in channel.severities), "ticket")
    for severity in severities:
        if severity == asked:
            return severity
    raise InputError("--severity", asked, "must be page, ticket or success", "name one of them")


def _try(channel: AnyChannel, severity: Severity) -> str | None:
    """Why it failed, or `None`."""
    try:
        messenger(channel).send(trial_notice(severity, now_us()))
    except (DeliveryError, ConfigError) as error:
        return str(error)
    return None
