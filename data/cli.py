"""Commands about data: `import`, `audit`, `curate`, `lineage`, `erase`; under `data`: datasets, detectors, agents."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.database import connect
from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.progress import progress_bar
from cluster.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)

FormatOption = Annotated[
    str,
    typer.Option("--format", help="auto, events, openai, or the name of a mapping in data/importers/mappings."),
]
SOURCES = "A file of JSON lines or Parquet, a database's URL, bigquery://PROJECT, or mlflow:EXPERIMENT."
TableOption = Annotated[str | None, typer.Option("--table", help="Table of the database.")]
QueryOption = Annotated[str | None, typer.Option("--query", help="Query whose rows are read.")]
MappingOption = Annotated[Path | None, typer.Option("--mapping", help="A mapping file of your own.")]


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help=SOURCES)],
    format: FormatOption = "auto",
    mapping: MappingOption = None,
    agent: Annotated[str | None, typer.Option("--agent", help="For rows that name no agent.")] = None,
    rejects: Annotated[Path | None, typer.Option("--rejects", help="Write every rejected row here.")] = None,
    table: TableOption = None,
    query: QueryOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bring events in from a file, table or traces; importing again adds nothing.

    Exit code 1 if a row was rejected.
    """
    from data.importers.open import open_source
    from data.importers.run import ImportOptions, ImportReport, Problem, import_source
    from data.log import EventLog

    settings = _settings(config)
    opened = open_source(source, settings, table=table, query=query)
    total = opened.total()
    engine = connect(settings)
    with progress_bar(f"importing {opened.name}", total) as on_progress, _rejects(rejects) as write_reject:

        def on_problem(problem: Problem) -> None:
            write_reject(problem.as_dict())

        options = ImportOptions(format, mapping, agent, on_problem, on_progress)
        report: ImportReport = import_source(opened, EventLog(engine), settings, options)
    if json_output:
        problems = [{k: v for k, v in p.as_dict().items() if k != "row"} for p in report.problems]
        _print_json(
            {
                "source": opened.name,
                "format": report.format,
                "rows": report.rows,
                "imported": report.imported,
                "duplicates": report.duplicates,
                "rejected": report.rejected,
                "events": dict(report.events),
                "problems": problems,
            }
        )
    else:
        _print_import(report, rejects)
    raise typer.Exit(1 if report.rejected else 0)


def _print_import(report: Any, rejects: Path | None) -> None:
    for problem in report.problems:
        print(f"line {problem.line}: {problem.field}={problem.value} {problem.rule}", file=sys.stderr)
    hidden = report.rejected - len(report.problems)
    if hidden:
        where = f"see {rejects}" if rejects else "use --rejects FILE to keep them all"
        print(f"and {hidden} more rejected rows; {where}", file=sys.stderr)
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(report.events.items())) or "nothing new"
    print(
        f"{report.rows} rows ({report.format}): {report.imported} imported, "
        f"{report.duplicates} already there, {report.rejected} rejected; events: {counts}"
    )
    if report.imported:
        print("next: rayloop curate")


@app.command()
def audit(
    sources: Annotated[list[str], typer.Argument(help=f"One or more. {SOURCES} All its tables without --table.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the description here, as Markdown.")] = None,
    table: TableOption = None,
    query: QueryOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Describe sources before they are imported: tables, columns, empties, relations, labels, baselines."""
    from data.importers.audit import audit_sources, to_markdown
    from data.importers.open import open_sources

    settings = _settings(config)
    opened = [each for text in sources for each in open_sources(text, settings, table=table, query=query)]
    report = audit_sources(opened, settings)
    text = to_markdown(report)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if json_output:
        _print_json(report)
    elif out is not None:
        print(f"wrote {out}\nnext: rayloop import {sources[0]}")
    else:
        print(text)


@app.command()
def lineage(
    version: Annotated[str, typer.Argument(help="A version (triage/3) or an alias (triage@champion).")],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """From a version to the feedback that made it, and on to what was decided about it."""
    from data.lineage import to_text, trace

    chain = trace(version, _settings(config))
    if json_output:
        _print_json(chain)
    else:
        print(to_text(chain))


@app.command()
def seal(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Write finished days of the event log to Parquet; let old bodies and event ids leave the database."""
    from cluster.clock import now_us
    from data.seal import seal as run

    settings = _settings(config)
    with progress_bar("sealing", 0) as on_progress:
        report = run(connect(settings), settings, now_us(), on_progress)
    if json_output:
        _print_json(report.as_dict())
        return
    for partition in report.partitions:
        print(f"{partition.name}  {partition.num_events} events  root {partition.root}")
    print(
        f"{report.events} events sealed at {settings.events_root}, {report.waiting} wait for the end of their day; "
        f"{report.bodies_left} bodies and {report.ids_forgotten} event ids left the database"
    )


@app.command()
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

    settings = _settings(config)
    name = user if pseudonym else pseudonym_of(pseudonym_secret(settings), settings.tenant, user)
    report = run(connect(settings), settings, Person(settings.tenant, name))
    if json_output:
        _print_json(report)
    else:
        print(describe(report))


@app.command()
def curate(
    agent: Annotated[str | None, typer.Option("--agent", help="Only this agent's interactions.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write into.")] = None,
    parallelism: Annotated[int | None, typer.Option("--parallelism", min=1, help="Blocks worked on at once.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Turn events into a dataset. The same events give the same dataset, whatever the parallelism."""
    settings = _settings(config)
    from data.curate import curate as run
    from data.show import as_json, to_text

    made = run(settings, agent=agent, out=out, parallelism=parallelism)
    if json_output:
        _print_json(as_json(made))
        return
    print(to_text(made))
    print(f"next: rayloop data validate {made.dataset_id if out is None else made.path}")


@app.command()
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
        settings = _settings(config)
        looks = Looks.of(settings.curation.scrub)
        print(*measure_marked(marked, looks=looks).lines(), sep="\n")
        return
    measures = measure_all(_settings(config))
    if json_output:
        _print_json({"detectors": [measure.as_dict() for measure in measures]})
    else:
        for measure in measures:
            print(measure)
    raise typer.Exit(0 if all(measure.met for measure in measures) else 1)


@app.command()
def eligible(
    dataset: Annotated[str, typer.Argument(help="Id, path, prefix of the hash, or latest.")] = "latest",
    method: Annotated[str, typer.Option("--method", help="sft, dpo, kto, ...")] = "sft",
    rules: Annotated[Path | None, typer.Option("--rules", help="Mapping rules that hold the archetype.")] = None,
    archetype: Annotated[str | None, typer.Option("--archetype", help="Judge its agents together.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """May a training start, and if not, what is missing? Exit code 1 if a rule failed."""
    from data.eligibility import eligibility
    from data.manifest import find_dataset, load_manifest

    settings = _settings(config)
    manifest = load_manifest(find_dataset(settings, dataset))
    engine = connect(settings)
    found = eligibility(settings, engine, manifest, method=method, agents=_agents_of(archetype, rules))
    engine.dispose()
    if json_output:
        shown = [
            {"name": r.name, "needed": r.needed, "found": min(r.found, 1e9), "passed": r.passed, "says": str(r)}
            for r in found
        ]
        _print_json({"dataset_id": manifest.dataset_id, "eligible": all(r.passed for r in found), "rules": shown})
    else:
        for rule in found:
            print(f"{'ok  ' if rule.passed else 'FAIL'} {rule}")
    raise typer.Exit(0 if all(rule.passed for rule in found) else 1)


def _agents_of(archetype: str | None, rules: Path | None) -> tuple[str, ...]:
    """The agents of an archetype in a file of rules; none where no archetype is asked for."""
    if archetype is None:
        return ()
    if rules is None:
        raise InputError("--rules", None, "is missing", "name the file that `rayloop data archetypes` wrote")
    from data.archetypes import load_rules

    known = {rule.name: rule.agents for rule in load_rules(rules)}
    if archetype not in known:
        raise InputError("--archetype", archetype, f"must be one of {', '.join(known)}", "name one of the file")
    return known[archetype]


@app.command()
def archetypes(
    rules: Annotated[Path, typer.Option("--rules", help="The mapping rules; written when absent.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the report here, as Markdown.")] = None,
    config: ConfigOption = None,
) -> None:
    """Which agents are alike, and what one could learn from another."""
    from data.archetypes import cluster_agents, load_rules, profiles, report, save_rules
    from data.log import EventLog

    settings = _settings(config)
    engine = connect(settings)
    found = profiles(EventLog(engine), settings)
    engine.dispose()
    if not rules.exists():
        save_rules(cluster_agents(found, settings.curation.archetypes), rules)
        print(f"wrote {rules}", file=sys.stderr)
    text = report(found, load_rules(rules))
    if out is None:
        print(text)
    else:
        out.write_text(text, encoding="utf-8")
        print(f"wrote {out}")


@app.command()
def calibration(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Hold the weights of implicit signals against what the same people said."""
    from data.calibration import calibrate, to_text

    settings = _settings(config)
    found = calibrate(connect(settings), settings)
    if json_output:
        _print_json(found.as_dict() | {"rewards": found.as_settings()})
    else:
        print(to_text(found))


@app.command("list")
def list_(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """The datasets there are, the oldest first."""
    from data.manifest import list_datasets
    from data.show import as_json, to_line

    found = list_datasets(_settings(config))
    if json_output:
        _print_json({"datasets": [as_json(manifest) for manifest in found]})
        return
    for manifest in found:
        print(to_line(manifest))
    print("next: rayloop data show DATASET" if found else "no datasets yet\nnext: rayloop curate")


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="Id, path, prefix of the hash, or latest.")] = "latest",
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """What a dataset holds and how it came about."""
    from data.manifest import find_dataset, load_manifest
    from data.show import as_json, to_text

    manifest = load_manifest(find_dataset(_settings(config), dataset))
    if json_output:
        _print_json(as_json(manifest))
        return
    print(to_text(manifest))
    print(f"next: rayloop train run --method dpo --dataset {manifest.dataset_id}")


@app.command()
def validate(
    dataset: Annotated[str, typer.Argument(help="Id, path, prefix of the hash, or latest.")] = "latest",
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Model folder whose template must fit.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest conversation, with --tokenizer.")
    ] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Is a dataset whole and fit to train on? Exit code 1 if a check failed."""
    from data.manifest import find_dataset, load_manifest
    from data.show import check_line, checks_as_json
    from data.validate import validate as run

    settings = _settings(config)
    manifest = load_manifest(find_dataset(settings, dataset))
    checks = run(manifest, settings, tokenizer=_tokenizer(tokenizer), max_tokens=max_tokens)
    failed = any(check.status == "failed" for check in checks)
    if json_output:
        _print_json(checks_as_json(manifest, checks))
    else:
        for check in checks:
            print(check_line(check))
        if not failed:
            print(f"next: rayloop train run --method dpo --dataset {manifest.dataset_id}")
    raise typer.Exit(1 if failed else 0)


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        return None
    if not folder.is_dir():
        raise InputError("tokenizer", str(folder), "must be a folder with a tokenizer", "name a model folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _settings(config: Path | None) -> Settings:
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    return settings


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


@contextmanager
def _rejects(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Something that writes rejected rows to a file of JSON lines, where one is wanted."""
    if path is None:
        yield lambda _: None
        return
    with path.open("w", encoding="utf-8") as file:
        yield lambda reject: print(json.dumps(reject, ensure_ascii=False, default=str), file=file)
