"""`rayloop keys`: create, list, rotate and revoke API keys."""

import json
from typing import Annotated, Any

import typer

from cluster.clock import to_iso
from cluster.database import connect
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import load_settings
from serve.keys import EVERYDAY, Key, create_key, list_keys, revoke_key, rotate_key

app = typer.Typer(no_args_is_help=True, add_completion=False)


HOUR_S, DAY_S = 3_600, 86_400


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what will use it.")],
    scopes: Annotated[
        str, typer.Option(help="Comma-separated: chat, feedback, label, owner, admin, tools, grade, train, erase.")
    ] = ",".join(EVERYDAY),
    tier: Annotated[str | None, typer.Option(help="User tier that its requests carry.")] = None,
    days: Annotated[float | None, typer.Option(help="Days until it expires.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Its own limit, else as configured.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Its own budget, else as configured.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a key; its secret is shown this once."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    lifetime_s = None if days is None else days * DAY_S
    secret = create_key(
        connect(settings),
        name,
        settings.tenant,
        settings.workspace,
        wanted,
        user_tier=tier,
        lifetime_s=lifetime_s,
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
    )
    if json_output:
        print(json.dumps({"name": name, "secret": secret, "scopes": wanted}))
    else:
        print(f"{secret}\n\nnext: export OPENAI_API_KEY={secret}")


@app.command("list")
def list_command(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """The keys of this tenant, without their secrets."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    keys = [_shown(key) for key in list_keys(connect(settings), settings.tenant)]
    if json_output:
        print(json.dumps({"keys": keys}))
        return
    for key in keys:
        state = "revoked" if key["revoked_at"] else "live"
        print(f"{key['key_id']}  {state:<8} {key['name']:<20} {','.join(key['scopes'])}")
    if not keys:
        print("no keys yet; next: rayloop keys create NAME")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `rayloop keys list` shows it.")],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a key worthless; routers notice within seconds."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    key = revoke_key(connect(settings), key_id, settings.tenant)
    print(json.dumps({"revoked": key.key_id}) if json_output else f"revoked {key.key_id} ({key.name})")


@app.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="As `rayloop keys list` shows it.")],
    overlap_hours: Annotated[float, typer.Option(help="How long the old secret still works.")] = 24.0,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give a key a new secret with the same rights and limits; shown this once."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    secret = rotate_key(connect(settings), key_id, overlap_hours * HOUR_S, settings.tenant)
    if json_output:
        print(json.dumps({"rotated": key_id, "secret": secret, "overlap_hours": overlap_hours}))
    else:
        print(
            f"{secret}\n\nthe old secret works for {overlap_hours:g} more hours; next: export OPENAI_API_KEY={secret}"
        )


def _shown(key: Key) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "name": key.name,
        "workspace": key.workspace,
        "scopes": sorted(key.scopes),
        "user_tier": key.user_tier,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_day": key.tokens_per_day,
        "created_at": to_iso(key.created_at_us),
        "expires_at": None if key.expires_at_us is None else to_iso(key.expires_at_us),
        "revoked_at": None if key.revoked_at_us is None else to_iso(key.revoked_at_us),
    }
