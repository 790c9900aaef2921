"""Commands about data: `import`, `audit`, `curate`, `lineage`, `erase`; under `data`: datasets, detectors, agents."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.database import connect
from cluster.errors import InputError
from cluster.options import ConfigOption, JsonOption
from cluster.progress import progress_bar
from cluster.settings import Settings
from data.command import command_settings, print_json
from data.dataset_cli import eligible, list_, show, validate
from data.importers.cli import audit, import_


def lineage(
    version: Annotated[str, typer.Argument(help="A version (triage/3) or an alias (triage@champion).")],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """From a version to the feedback that made it, and on to what was decided about it."""
    from data.lineage import to_text, trace

    chain = trace(version, command_settings(config))
    if json_output:
        print_json(chain)
    else:
        print(to_text(chain))


def seal(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Write finished days of the event log to Parquet; let old bodies and event ids leave the database."""
    from cluster.clock import now_us
    from data.seal import seal as run

    settings = command_settings(config)
    with progress_bar("sealing", 0) as on_progress:
        report = run(connect(settings), settings, now_us(), on_progress)
    if json_output:
        print_json(report.as_dict())
        return
    for partition in report.partitions:
        print(f"{partition.name}  {partition.num_events} events  root {partition.root}")
    print(
        f"{report.events} events sealed at {settings.events_root}, {report.waiting} wait for the end of their day; "
        f"{report.bodies_left} bodies and {report.ids_forgotten} event ids left the database"
    )


def erase(
    user: Annotated[str, typer.Argument(help="The user, as the client names them.")],
    pseudonym: Annotated[
        bool, typer.Option("--pseudonym", help="USER is the name in the log, not the client's.")
    ] = False,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove a person from log, sealed days, datasets and caches; mark versions trained on them."""
    from data.erasure.erase import erase as run
    from data.erasure.files import describe
    from data.erasure.person import Person
    from data.feedback import pseudonym as pseudonym_of
    from data.feedback import pseudonym_secret

    settings = command_settings(config)
    name = user if pseudonym else pseudonym_of(pseudonym_secret(settings), settings.tenant, user)
    report = run(connect(settings), settings, Person(settings.tenant, name))
    if json_output:
        print_json(report)
    else:
        print(describe(report))


def curate(
    agent: Annotated[str | None, typer.Option("--agent", help="Only this agent's interactions.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write into.")] = None,
    parallelism: Annotated[int | None, typer.Option("--parallelism", min=1, help="Blocks worked on at once.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Turn events into a dataset. The same events give the same dataset, whatever the parallelism."""
    settings = command_settings(config)
    from data.curate import curate as run
    from data.show import as_json, to_text

    made = run(settings, agent=agent, out=out, parallelism=parallelism)
    if json_output:
        print_json(as_json(made))
        return
    print(to_text(made))
    print(f"next: rayloop data validate {made.dataset_id if out is None else made.path}")


def detectors(
    marked: Annotated[
        Path | None, typer.Option("--marked", help="Sentences with marked personal data, to measure scrubbing on.")
    ] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Precision and recall of every detector on its held-out cases. Exit code 1 if a bar is missed."""
    from data.detectors.marked import measure_marked
    from data.detectors.measure import measure_all
    from data.scrub_text import Looks

    if marked is not None:
        settings = command_settings(config)
        looks = Looks.of(settings.curation.scrub)
        print(*measure_marked(marked, looks=looks).lines(), sep="\n")
        return
    measures = measure_all(command_settings(config))
    if json_output:
        print_json({"detectors": [measure.as_dict() for measure in measures]})
    else:
        for measure in measures:
            print(measure)
    raise typer.Exit(0 if all(measure.met for measure in measures) else 1)


def archetypes(
    rules: Annotated[
        Path | None, typer.Option("--rules", help="Mapping rules of your own; written when absent.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="With --rules: write the report here, as Markdown.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Which agents are alike, and what one could learn from another.

    Without --rules it is the monthly look: rules and this month's report are in <home>/archetypes.
    """
    if rules is None and out is not None:
        raise InputError("--out", str(out), "needs --rules", "name a file for the rules, or leave --out away")
    if rules is None:
        _look_at_month(command_settings(config), json_output)
    else:
        _report_by(rules, out, command_settings(config), json_output)


def _look_at_month(settings: Settings, json_output: bool) -> None:
    from cluster.clock import now_us
    from data.archetypes_monthly import look_at_month

    engine = connect(settings)
    month = look_at_month(engine, settings, now_us())
    engine.dispose()
    if json_output:
        print_json(month.as_dict())
    elif month.report is None:
        print(f"{month.agents} agents have enough interactions; archetypes need two or more")
    else:
        print(f"{month.agents} agents, {month.archetypes} archetypes, {month.transfers} transfers suggested")
        print(f"wrote {month.report}; its rules are in {month.rules}")


def _report_by(rules: Path, out: Path | None, settings: Settings, json_output: bool) -> None:
    from data.archetypes import cluster_agents, load_rules, profiles, report, save_rules
    from data.log import EventLog

    engine = connect(settings)
    found = profiles(EventLog(engine), settings)
    engine.dispose()
    if not rules.exists():
        save_rules(cluster_agents(found, settings.curation.archetypes), rules)
        print(f"wrote {rules}", file=sys.stderr)
    text = report(found, load_rules(rules))
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if json_output:
        print_json({"rules": str(rules), "report": text})
    else:
        print(text if out is None else f"wrote {out}")


def calibration(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Hold the weights of implicit signals against what the same people said."""
    from data.calibration import calibrate, to_text

    settings = command_settings(config)
    found = calibrate(connect(settings), settings)
    if json_output:
        print_json(found.as_dict() | {"rewards": found.as_settings()})
    else:
        print(to_text(found))


app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command("import")(import_)
app.command()(audit)
app.command()(lineage)
app.command()(seal)
app.command()(erase)
app.command()(curate)
app.command()(detectors)
app.command()(eligible)
app.command()(archetypes)
app.command()(calibration)
app.command("list")(list_)
app.command()(show)
app.command()(validate)
