"""Commands about data: `import`, `audit`, `curate`, `lineage`, `verify`; `data list`, `show`, `validate`."""

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
from cluster.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="The rayloop.yaml to use.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
FormatOption = Annotated[
    str,
    typer.Option("--format", help="auto, events, openai, or the name of a mapping in data/mappings."),
]
MappingOption = Annotated[Path | None, typer.Option("--mapping", help="A mapping file of your own.")]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON lines or Parquet.")],
    format: FormatOption = "auto",
    mapping: MappingOption = None,
    agent: Annotated[str | None, typer.Option("--agent", help="For rows that name no agent.")] = None,
    rejects: Annotated[Path | None, typer.Option("--rejects", help="Write every rejected row here.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bring events in from a file; importing it again adds nothing. Exit code 1 if a row was rejected."""
    from data.importers import ImportOptions, ImportReport, Problem, import_file
    from data.log import EventLog
    from data.rows import size

    settings = _settings(config)
    total = size(file)
    engine = connect(settings)
    with _progress(f"importing {file.name}", total) as on_progress, _rejects(rejects) as write_reject:

        def on_problem(problem: Problem) -> None:
            write_reject(problem.as_dict())

        options = ImportOptions(format, mapping, agent, on_problem, on_progress)
        report: ImportReport = import_file(file, EventLog(engine), settings, options)
    if json_output:
        problems = [{k: v for k, v in p.as_dict().items() if k != "row"} for p in report.problems]
        _print_json(
            {
                "file": str(file),
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
    files: Annotated[list[Path], typer.Argument(help="JSON lines or Parquet, one or more.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the description here, as Markdown.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Describe files before they are imported: columns, empties, relations, labels, baselines."""
    from data.audit import audit_files, to_markdown

    settings = _settings(config)
    report = audit_files(files, settings)
    text = to_markdown(report)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if json_output:
        _print_json(report)
    elif out is not None:
        print(f"wrote {out}\nnext: rayloop import {files[0]}")
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
def verify(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Check the event log: nothing dropped, nothing altered. Exit code 1 if something was."""
    from data.verify import verify_log

    settings = _settings(config)
    engine = connect(settings)
    with _progress("verifying", 0) as on_progress:
        report = verify_log(engine, settings, on_progress)
    if json_output:
        _print_json(report.as_dict())
    else:
        for fault in report.faults:
            place = "" if fault.seq is None else f"seq {fault.seq}: "
            print(f"{place}{fault.what}", file=sys.stderr)
        print(f"{report.events} events, {report.erased} erased, {report.fault_count} faults")
    raise typer.Exit(1 if report.fault_count else 0)


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
    checks = run(manifest, settings.curation, tokenizer=_tokenizer(tokenizer), max_tokens=max_tokens)
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


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, where a person watches; total 0 means unknown."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda done: progress.update(task, completed=done)
