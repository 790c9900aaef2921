"""`rayloop import` and `rayloop audit`: events from a file, a table or traces, and a look at a source before that."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.database import connect
from cluster.options import ConfigOption, JsonOption
from cluster.progress import progress_bar
from data.command import command_settings, print_json

FormatOption = Annotated[
    str,
    typer.Option("--format", help="auto, events, openai, or the name of a mapping in data/importers/mappings."),
]
SOURCES = "A file of JSON lines or Parquet, a database's URL, bigquery://PROJECT, or mlflow:EXPERIMENT."
TableOption = Annotated[str | None, typer.Option("--table", help="Table of the database.")]
QueryOption = Annotated[str | None, typer.Option("--query", help="Query whose rows are read.")]
MappingOption = Annotated[Path | None, typer.Option("--mapping", help="A mapping file of your own.")]


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

    settings = command_settings(config)
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
        print_json(
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

    settings = command_settings(config)
    opened = [each for text in sources for each in open_sources(text, settings, table=table, query=query)]
    report = audit_sources(opened, settings)
    text = to_markdown(report)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if json_output:
        print_json(report)
    elif out is not None:
        print(f"wrote {out}\nnext: rayloop import {sources[0]}")
    else:
        print(text)


@contextmanager
def _rejects(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Something that writes rejected rows to a file of JSON lines, where one is wanted."""
    if path is None:
        yield lambda _: None
        return
    with path.open("w", encoding="utf-8") as file:
        yield lambda reject: print(json.dumps(reject, ensure_ascii=False, default=str), file=file)
