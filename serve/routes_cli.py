"""`rayloop route`: read a traffic split, change it, or pin stable."""

import getpass
import json
from typing import Annotated, Any

import typer
from sqlalchemy.engine import Engine

from cluster.clock import to_iso
from cluster.database import connect
from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings
from serve.accepted_config import last_accepted
from serve.readiness import NotReadyError, only_ready
from serve.routes import Check, Route, RouteKey, read_route, read_routes, update_route, write_route

app = typer.Typer(no_args_is_help=True, add_completion=False)

AgentArgument = Annotated[str, typer.Argument(help="The agent whose route it is.")]
ModalityOption = Annotated[str, typer.Option(help="Modality of the route.")]
ReasonOption = Annotated[str | None, typer.Option(help="Kept with the event.")]
NO_CANDIDATE = "none"


@app.command()
def show(
    agent: Annotated[str | None, typer.Argument(help="One agent; all of them without.")] = None,
    modality: ModalityOption = "text",
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """The routes of this tenant."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    engine = connect(settings)
    if agent is None:
        found = read_routes(engine, settings.tenant)
    else:
        found = [read_route(engine, RouteKey(settings.tenant, agent, modality))]
    if json_output:
        print(json.dumps({"routes": [_document(route) for route in found]}))
    elif found:
        print("\n".join(_line(route) for route in found))
    else:
        print("no routes yet; next: rayloop route set AGENT --stable AGENT/1")


@app.command("set")
def set_command(
    agent: AgentArgument,
    stable: Annotated[str | None, typer.Option(help="Version that answers by default.")] = None,
    candidate: Annotated[str | None, typer.Option(help="Version on trial; `none` takes it away.")] = None,
    share: Annotated[float | None, typer.Option(help="Share of users on the candidate, 0 to 1.")] = None,
    shadow: Annotated[str | None, typer.Option(help="Version that answers unseen; `none` takes it away.")] = None,
    revision: Annotated[int | None, typer.Option(help="Refuse when the route has another revision.")] = None,
    modality: ModalityOption = "text",
    force: Annotated[bool, typer.Option("--force", help="Also for a version that is not ready to answer.")] = False,
    reason: ReasonOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Change a route, or make it.

    A version that begins to answer users must have passed its engine's checks.
    """
    named = {"stable": stable, "candidate": candidate, "share": share, "shadow": shadow}
    change: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for name in ("candidate", "shadow"):
        if change.get(name) == NO_CANDIDATE:
            change[name] = None
    if change.get("candidate", "") is None:
        change.setdefault("share", 0.0)
    if not change:
        raise InputError("change", "", "is empty", "give --stable, --candidate, --share or --shadow")
    settings, _ = load_settings(config)
    key = RouteKey(settings.tenant, agent, modality)
    _write(settings, key, change, revision, reason, json_output, ready_only=not force)


@app.command()
def pin(
    agent: AgentArgument,
    modality: ModalityOption = "text",
    reason: ReasonOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Everybody gets stable at once, whatever the share; `unpin` ends it."""
    settings, _ = load_settings(config)
    _write(settings, RouteKey(settings.tenant, agent, modality), {"pinned": True}, None, reason, json_output)


@app.command()
def unpin(
    agent: AgentArgument,
    modality: ModalityOption = "text",
    reason: ReasonOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """The share counts again."""
    settings, _ = load_settings(config)
    _write(settings, RouteKey(settings.tenant, agent, modality), {"pinned": False}, None, reason, json_output)


def _write(
    settings: Settings,
    key: RouteKey,
    change: dict[str, Any],
    revision: int | None,
    reason: str | None,
    json_output: bool,
    ready_only: bool = False,
) -> None:
    configure_logging(settings.logging)
    engine = connect(settings)
    writer = f"person:{getpass.getuser()}"
    check = _only_ready(settings, engine) if ready_only else None
    if revision is None:
        if set(change) == {"pinned"}:
            read_route(engine, key)  # pinning makes no route
        route = update_route(
            engine, key, change, writer=writer, reason=reason, workspace=settings.workspace, check=check
        )
    else:
        route = write_route(
            engine,
            key,
            change,
            expected_revision=revision,
            writer=writer,
            reason=reason,
            workspace=settings.workspace,
            check=check,
        )
    print(json.dumps(_document(route)) if json_output else _line(route))


def _only_ready(settings: Settings, engine: Engine) -> Check:
    """As the routers see it, with the engines of the deployment config that they follow."""
    accepted = last_accepted(engine, settings.tenant)
    endpoints = {**settings.serve.engines, **(accepted.engines if accepted is not None else {})}
    check = only_ready(engine, endpoints, live_after_s=settings.engine.live_after_s)

    def with_remedy(before: Route | None, after: Route) -> None:
        try:
            check(before, after)
        except NotReadyError as error:
            raise NotReadyError(f"{error}; `--force` writes the route all the same") from None

    return with_remedy


def _document(route: Route) -> dict[str, Any]:
    return route.columns() | {"candidate": route.candidate, "share": route.share, "live_share": route.live_share}


def _line(route: Route) -> str:
    parts = [f"{route.agent} ({route.modality}): stable {route.stable}"]
    live = {arm.version: arm.share for arm in route.live}
    parts += [f"candidate {arm.version} at {live.get(arm.version, 0.0):.0%}" for arm in route.arms]
    if route.max_share < 1:
        parts.append(f"ceiling {route.max_share:.0%}")
    if route.pinned:
        parts.append("pinned to stable")
    parts.append(f"revision {route.revision} by {route.updated_by}, {to_iso(route.updated_at_us)}")
    return ", ".join(parts)
