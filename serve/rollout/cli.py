"""`rayloop rollout`: start a candidate, watch it, let it go on, stop it, take it back."""

import getpass
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.errors import InputError, NotFoundError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)

RolloutArgument = Annotated[str | None, typer.Argument(help="Rollout id, agent or candidate; the newest one without.")]
ReasonOption = Annotated[str | None, typer.Option(help="Kept with the decision.")]
WATCH_S = 1.0


@app.command()
def start(
    version: Annotated[str, typer.Argument(help="The version to try, such as triage/3.")],
    agent: Annotated[str | None, typer.Option(help="The route; the version's own agent without.")] = None,
    modality: Annotated[str, typer.Option(help="Modality of the route.")] = "text",
    stage_share: Annotated[
        list[float] | None, typer.Option(help="Share of a stage; repeat it for each (with one check each).")
    ] = None,
    stage_duration_s: Annotated[float | None, typer.Option(help="Every stage lasts at least this long.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Share users' buckets with the experiments of this layer; alone without.")
    ] = None,
    override_gates: Annotated[bool, typer.Option(help="Start a version that has not passed its gates.")] = False,
    reason: ReasonOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give a version its first users, stage by stage."""
    from serve.rollout import commands
    from serve.routes import RouteKey

    if override_gates and not reason:
        raise InputError("reason", reason, "is needed to override the gates", "add --reason TEXT")
    settings, engine = _open(config, _overrides(stage_share, stage_duration_s))
    key = RouteKey(settings.tenant, agent or version.partition("/")[0], modality)
    rollout = commands.start(
        _steps(engine, settings), settings, key, version, actor=_actor(),
        override_reason=reason if override_gates else None, layer=layer,
    )  # fmt: skip
    _print(engine, rollout.rollout_id, json_output)
    if not json_output:
        if not _is_controlled(engine):
            print("no controller is running: it begins once `rayloop up` has started one")
        print(f"next: rayloop rollout watch {rollout.rollout_id}")


@app.command()
def status(rollout: RolloutArgument = None, config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Where a rollout stands and why, with what it rests on."""
    settings, engine = _open(config)
    rollout_id = _find(engine, settings, rollout)
    _print(engine, rollout_id, json_output, with_evidence=True)


@app.command("list")
def list_command(
    agent: Annotated[str | None, typer.Option(help="Only this agent's.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """All rollouts of this tenant, oldest first."""
    from serve.rollout.report import describe, line
    from serve.rollout.store import list_rollouts

    settings, engine = _open(config)
    found = list_rollouts(engine, settings.tenant, agent)
    if json_output:
        print(json.dumps({"rollouts": [describe(rollout) for rollout in found]}))
    else:
        print("\n".join(line(r) for r in found) or "no rollouts yet; next: rayloop rollout start VERSION")


@app.command()
def watch(
    rollout: RolloutArgument = None,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this long.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Follow a rollout to its end."""
    from serve.rollout.report import line
    from serve.rollout.state import ENDED
    from serve.rollout.store import get_rollout

    settings, engine = _open(config)
    rollout_id = _find(engine, settings, rollout)
    deadline, shown = time.monotonic() + (timeout_s or float("inf")), ""
    while True:
        found = get_rollout(engine, rollout_id)
        if (text := line(found)) != shown:
            print(text, file=sys.stderr, flush=True)
            shown = text
        if found.state in ENDED or time.monotonic() > deadline:
            break
        time.sleep(min(WATCH_S, settings.rollout.tick_s))
    _print(engine, rollout_id, json_output)
    if found.state not in ENDED:
        raise typer.Exit(1)


@app.command()
def approve(rollout: RolloutArgument = None, config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Let a rollout leave its stage, as soon as its checks hold."""
    _command("approve", rollout, config, json_output)


@app.command()
def freeze(
    rollout: RolloutArgument = None,
    reason: ReasonOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Stop a rollout where it is; guardrails still roll it back."""
    _command("freeze", rollout, config, json_output, reason=reason)


@app.command()
def unfreeze(rollout: RolloutArgument = None, config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Go on after a freeze, or after somebody changed the route."""
    _command("unfreeze", rollout, config, json_output)


@app.command()
def rollback(
    rollout: RolloutArgument = None,
    reason: Annotated[str, typer.Option(help="Kept with the decision and the version.")] = "no reason given",
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Send every user back to stable, now; after a promotion the old champion returns."""
    _command("roll_back", rollout, config, json_output, reason=reason)


def _command(name: str, rollout: str | None, config: Path | None, json_output: bool, **named: Any) -> None:
    from serve.rollout import commands

    settings, engine = _open(config)
    rollout_id = _find(engine, settings, rollout, live=True)
    getattr(commands, name)(_steps(engine, settings), rollout_id, _actor(), **named)
    _print(engine, rollout_id, json_output)


def _open(config: Path | None, overrides: dict[str, Any] | None = None) -> tuple[Settings, Engine]:
    settings, _ = load_settings(config, **(overrides or {}))
    configure_logging(settings.logging)
    return settings, connect(settings)


def _steps(engine: Engine, settings: Settings) -> Any:
    from serve.rollout.live import command_steps

    return command_steps(engine, settings)


def _overrides(stage_share: list[float] | None, stage_duration_s: float | None) -> dict[str, Any]:
    rollout: dict[str, Any] = {}
    if stage_share:
        checks = ["no_regression", "positive_trend", "significant_improvement", "final_validation"]
        middle = ["positive_trend"] * (len(stage_share) - len(checks)) + checks[1:]
        rollout |= {"stages": stage_share}
        rollout["checks"] = [checks[0], *middle] if len(stage_share) >= len(checks) else checks[-len(stage_share) :]
    if stage_duration_s is not None:
        rollout["stage_duration_s"] = stage_duration_s
    return {"rollout": rollout} if rollout else {}


def _find(engine: Engine, settings: Settings, name: str | None, *, live: bool = False) -> str:
    """The rollout of that id, agent or candidate; without a name the newest, or the only live one.

    Raises:
        NotFoundError: there is none.
        InputError: several are live.
    """
    from serve.rollout.state import ENDED
    from serve.rollout.store import list_rollouts

    known = list_rollouts(engine, settings.tenant)
    if name is not None:
        known = [r for r in known if name in (r.rollout_id, r.experiment.agent, r.experiment.candidate)]
    at_work = [r for r in known if r.state not in ENDED]
    if live and len(at_work) > 1:
        ids = ", ".join(f"{r.rollout_id} ({r.experiment.candidate})" for r in at_work)
        raise InputError("rollout", name, f"must be named, as several are live: {ids}", "name one")
    if live and (at_work or name is None):
        known = at_work
    if not known:
        raise NotFoundError(f"no rollout {name or 'is live'}; see `rayloop rollout list`")
    return known[-1].rollout_id


def _print(engine: Engine, rollout_id: str, json_output: bool, *, with_evidence: bool = False) -> None:
    from serve.rollout.report import describe, last_decision, line, table
    from serve.rollout.store import get_rollout

    rollout = get_rollout(engine, rollout_id)
    document = describe(rollout)
    if with_evidence:
        document["last_decision"] = last_decision(engine, rollout)
    if json_output:
        print(json.dumps(document))
        return
    print(line(rollout))
    if with_evidence:
        print(table(document["last_decision"]))


def _is_controlled(engine: Engine) -> bool:
    from cluster.clock import now_us
    from cluster.lease import lease_holder
    from serve.rollout.controller import LEASE

    return lease_holder(engine, LEASE, now_us()) is not None


def _actor() -> str:
    return f"person:{getpass.getuser()}"
