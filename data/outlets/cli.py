"""`rayloop outlets`: how far each is, what they could not deliver, and running them without the live side."""

import json
import signal
import threading
from typing import Annotated, Any

import typer

from cluster.clock import now_us, to_iso
from cluster.database import connect
from cluster.errors import NotFoundError, UnavailableError
from cluster.lease import lease_holder
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings
from cluster.webhook import DeliveryError
from data.outlets.loop import OutletLoop
from data.outlets.outlet import Outlet, Plan, drop, read_dead_letters, read_progress, resend, waiting
from data.outlets.sinks import plans

app = typer.Typer(no_args_is_help=True, add_completion=False)

NameArgument = Annotated[str, typer.Argument(help="As `rayloop outlets list` shows it: outlet:NAME or notify:NAME.")]


@app.command("list")
def list_command(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Every outlet and channel: how far it is, what waits, why it stands still."""
    settings, _ = load_settings(config)
    engine = connect(settings)
    known = {progress.name: progress for progress in read_progress(engine)}
    dead = [letter["outlet"] for letter in read_dead_letters(engine)]
    rows: list[dict[str, Any]] = []
    for plan in plans(settings):
        progress = known.get(plan.name)
        row: dict[str, Any] = {"name": plan.name, "started": progress is not None, "dead": dead.count(plan.name)}
        row["runs_in"] = lease_holder(engine, plan.name, now_us())
        if progress is not None:
            row |= {"seq": progress.seq, "delivered": progress.delivered, "failure": progress.failure}
            row["waiting"] = waiting(engine, plan, progress.seq)
        rows.append(row)
    if json_output:
        print(json.dumps({"outlets": rows}))
        return
    for row in rows:
        print(_line(row))
    print("next: rayloop outlets dead" if dead else "no dead letters" if rows else "none; see docs/notifications.md")


def _line(row: dict[str, Any]) -> str:
    if not row["started"]:
        return f"{row['name']:<28} has not run yet"
    where = "runs" if row["runs_in"] else "does not run"
    failure = f", {row['failure']}" if row["failure"] else ""
    numbers = f"{row['delivered']} delivered, {row['waiting']} waiting, {row['dead']} dead"
    return f"{row['name']:<28} {where}: {numbers}{failure}"


@app.command()
def run(
    once: Annotated[bool, typer.Option(help="Deliver what waits, then end.")] = False,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Deliver without the live side: until interrupted, or once."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    if once:
        _run_once(settings, json_output)
        return
    loop, ended = OutletLoop(settings), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    loop.start()
    while loop.alive and not ended.wait(settings.outlets.poll_s):
        pass
    loop.stop()
    if not ended.is_set():
        raise UnavailableError("no outlet runs; the log says why")


def _run_once(settings: Settings, json_output: bool) -> None:
    engine = connect(settings)
    results: dict[str, dict[str, Any]] = {}
    for plan in plans(settings):
        outlet = Outlet(plan, engine, settings.outlets)
        before = outlet.progress()
        while not outlet.progress().attempts and outlet.step() == 0.0:
            pass
        after = outlet.progress()
        dead = [letter for letter in read_dead_letters(engine, plan.name) if letter["seq"] > before.seq]
        results[plan.name] = {
            "delivered": after.delivered - before.delivered,
            "dead": len(dead),
            "failure": after.failure or (dead[-1]["reason"] if dead else None),
        }
    if json_output:
        print(json.dumps({"outlets": results}))
    else:
        for name, result in results.items():
            print(
                f"{name:<28} {result['delivered']} delivered" + (f", {result['failure']}" if result["failure"] else "")
            )
    failed = [name for name, result in results.items() if result["failure"]]
    if failed:
        raise UnavailableError(f"{', '.join(failed)} could not deliver everything; see `rayloop outlets list`")


@app.command()
def dead(
    name: Annotated[str | None, typer.Argument(help="Only this outlet's.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Events that were put aside, and why."""
    settings, _ = load_settings(config)
    letters = read_dead_letters(connect(settings), name)
    if json_output:
        print(json.dumps({"dead_letters": letters}))
        return
    for letter in letters:
        when = to_iso(letter["died_at_us"])[:19]
        print(f"{letter['outlet']:<28} {letter['seq']:>9} {letter['kind']:<18} {when} {letter['reason']}"[:160])
    print("next: rayloop outlets retry NAME" if letters else "no dead letters")


@app.command()
def retry(
    name: NameArgument,
    seq: Annotated[int | None, typer.Option(help="Only this one; all of the outlet's where absent.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Send dead letters now; those that arrive are dead no longer."""
    settings, _ = load_settings(config)
    engine, sink = connect(settings), _plan(settings, name).open()
    wanted = [seq] if seq is not None else [letter["seq"] for letter in read_dead_letters(engine, name)]
    failures: dict[int, str] = {}
    for number in wanted:
        try:
            resend(engine, name, sink, number)
        except DeliveryError as error:
            failures[number] = str(error)
    if json_output:
        print(json.dumps({"sent": len(wanted) - len(failures), "failed": failures}))
    else:
        print(f"{len(wanted) - len(failures)} of {len(wanted)} sent")
    if failures:
        raise UnavailableError(f"{len(failures)} were not taken; the first: {next(iter(failures.values()))}")


@app.command("drop")
def drop_command(
    name: NameArgument,
    seq: Annotated[int, typer.Option(help="The letter's event.")],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Forget a dead letter; its event stays in the log."""
    settings, _ = load_settings(config)
    engine = connect(settings)
    if not any(letter["seq"] == seq for letter in read_dead_letters(engine, name)):
        raise NotFoundError(f"{name} has no dead letter {seq}; see `rayloop outlets dead`")
    drop(engine, name, seq)
    print(json.dumps({"dropped": seq}) if json_output else f"dropped {seq}")


def _plan(settings: Settings, name: str) -> Plan:
    known = {plan.name: plan for plan in plans(settings)}
    if name not in known:
        raise NotFoundError(f"no outlet {name!r}; configured are {', '.join(known) or 'none'}")
    return known[name]
