"""`rayloop verify`: the event log, and every decision that was made from it."""

import json
import sys

import typer

from cluster.database import connect
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.progress import progress_bar
from cluster.settings import load_settings

app = typer.Typer(no_args_is_help=False, add_completion=False)


@app.command()
def verify(
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check the event log and its sealed days, and rebuild every decision. Exit code 1 if something was altered."""
    from data.verify.run import verify_log
    from serve.rollout.replay import verify_decisions

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    engine = connect(settings)
    with progress_bar("verifying", 0) as on_progress:
        report = verify_log(engine, settings, on_progress)
    decisions = verify_decisions(engine)
    if json_output:
        print(json.dumps(report.as_dict() | {"replay": decisions.as_dict()}))
    else:
        for fault in report.faults:
            place = "" if fault.seq is None else f"seq {fault.seq}: "
            print(f"{place}{fault.what}", file=sys.stderr)
        for wrong in decisions.faults:
            print(f"seq {wrong.seq}: decision {wrong.number} of {wrong.rollout_id}: {wrong.what}", file=sys.stderr)
        counts = f"{report.events} events, {report.erased} erased, {report.partitions} sealed partitions"
        print(f"{counts}, {report.fault_count} faults")
        print(f"{decisions.decisions} decisions, {decisions.rebuilt} rebuilt, {len(decisions.faults)} faults")
        for rollout_id, erased in decisions.erased_behind.items():
            if erased:
                print(f"{rollout_id}: {erased} interactions behind it were erased since")
    raise typer.Exit(1 if report.fault_count or decisions.faults else 0)
