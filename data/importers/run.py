"""Files, tables and traces into the event log: a row is imported, a duplicate, or rejected with line, field and rule.

A row that gives several events is taken whole or not at all. Event ids come from the row's content, so
importing a file twice, or a longer version of it, adds only what is new.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cluster.clock import now_us
from cluster.errors import ErasedError, InputError
from cluster.settings import Settings
from data.events import Event
from data.feedback import pseudonym_secret
from data.importers.mapping import Mapping, load_mapping, shipped_mappings
from data.importers.source import Source
from data.intake.items import Identity, Parser
from data.log import EventLog
from data.rows import Row

EVENTS = "events"
"""The format of rows that are items already, each with its `kind`."""

JSON_FIELDS = (
    "messages",
    "tools",
    "tool_calls",
    "arguments",
    "result",
    "response",
    "metadata",
    "context",
    "parameters",
    "flags",
)
"""Fields that may come as JSON text, as Parquet files often hold them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was rejected."""

    line: int
    field: str
    value: str
    rule: str
    row: Any

    def as_dict(self) -> dict[str, Any]:
        """For reports and the file of rejects."""
        return {
            "line": self.line,
            "field": self.field,
            "value": self.value,
            "rule": self.rule,
            "row": self.row,
        }


@dataclass(slots=True)
class ImportReport:
    """What an import came to."""

    format: str
    rows: int = 0
    imported: int = 0
    duplicates: int = 0
    rejected: int = 0
    events: Counter[str] = field(default_factory=Counter)
    """New events by kind."""
    problems: list[Problem] = field(default_factory=list)
    """The first rejected rows."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How rows are read."""

    format: str = "auto"
    """`auto`, `events`, `openai`, or the name of a mapping."""
    mapping: Path | None = None
    """A mapping of one's own; `format` is then not looked at."""
    agent: str | None = None
    """For items that name no agent."""
    on_problem: Callable[[Problem], None] | None = None
    """Called for every rejected row."""
    on_progress: Callable[[int], None] | None = None
    """Called with how far the source has been read (`Row.end`)."""


def import_source(source: Source, log: EventLog, settings: Settings, options: ImportOptions) -> ImportReport:
    """Import the rows of a source, in transactions of many rows.

    Raises:
        InputError: the source cannot be read, holds nothing, or its format cannot be told.
        UnavailableError: its server does not answer.
    """
    rows = source.rows()
    head = list(_up_to_a_whole_row(rows))
    if not head:
        raise InputError("source", source.name, "holds no rows", "name another table, query or file")
    name, mapping = choose_format(head[-1], options)
    report = ImportReport(name)
    reader = _Reader(mapping, settings, options)
    batch: list[tuple[Row, list[Event]]] = []
    waiting = 0
    for row in itertools.chain(head, rows):
        report.rows += 1
        try:
            batch.append((row, reader.events(row)))
        except InputError as error:
            _reject(report, row, error, settings, options)
            continue
        waiting += len(batch[-1][1])
        if waiting >= settings.intake.import_batch_events:
            _append(batch, log, report, settings, options)
            batch, waiting = [], 0
    _append(batch, log, report, settings, options)
    return report


def choose_format(row: Row, options: ImportOptions) -> tuple[str, Mapping | None]:
    """The format's name and mapping (`None`: rows are items), told from a row where `auto`.

    Raises:
        InputError: no such format, or none fits.
    """
    if options.mapping is not None:
        return options.mapping.stem, load_mapping(options.mapping)
    shipped = shipped_mappings()
    if options.format in (EVENTS, *shipped):
        return options.format, shipped.get(options.format)
    known = f"auto, {EVENTS}, openai, {', '.join(shipped)}"
    if options.format not in ("auto", "openai"):
        raise InputError("format", options.format, f"must be one of {known}", "choose one, or give --mapping")
    if options.format == "auto" and isinstance(row.value, dict) and "kind" in row.value:
        return EVENTS, None
    for name, mapping in shipped.items():
        if mapping.fits(row.value) and (options.format == "auto" or name.startswith("openai")):
            return name, mapping
    columns = ", ".join(row.value) if isinstance(row.value, dict) else type(row.value).__name__
    raise InputError("format", options.format, f"fits no row with {columns}", f"use one of {known}, or --mapping")


class _Reader:
    """Turns rows into events."""

    def __init__(self, mapping: Mapping | None, settings: Settings, options: ImportOptions) -> None:
        self._mapping = mapping
        self._options = options
        self._identity = Identity(settings.tenant, settings.workspace)
        self._parser = Parser(settings, pseudonym_secret(settings))
        self._now_us = now_us()
        self._seen = Counter[bytes]()

    def events(self, row: Row) -> list[Event]:
        """The events of one row; `InputError` if any of them is bad."""
        if row.error is not None:
            raise row.error
        if not isinstance(row.value, dict):
            raise InputError("row", row.value, "must be an object", "write one JSON object a line")
        items = [self._item(row.value)] if self._mapping is None else self._mapping.items(row.value)
        return [self._event(kind, item) for kind, item in items]

    def _item(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        item = {name: _unpacked(name, value) for name, value in row.items() if name != "kind"}
        if "event_id" not in item:
            item["event_id"] = f"row-{self._digest(row)}"
        return str(row.get("kind")), item

    def _digest(self, row: dict[str, Any]) -> str:
        """A name for a row without an id: its hash, and a number where the same row comes again."""
        text = orjson.dumps(row, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str)
        digest = hashlib.sha256(text).digest()[:16]
        self._seen[digest] += 1
        return digest.hex() if self._seen[digest] == 1 else f"{digest.hex()}-{self._seen[digest]}"

    def _event(self, kind: str, item: dict[str, Any]) -> Event:
        if kind == "interaction":
            item.setdefault("interaction_id", item.get("event_id"))
        if self._options.agent is not None:
            item.setdefault("agent", self._options.agent)
        return self._parser.parse(item, kind, self._identity, self._now_us)


def _unpacked(name: str, value: Any) -> Any:
    if name not in JSON_FIELDS or not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value


def _append(
    batch: list[tuple[Row, list[Event]]],
    log: EventLog,
    report: ImportReport,
    settings: Settings,
    options: ImportOptions,
) -> None:
    verdicts = iter(log.append([event for _, events in batch for event in events]))
    for row, events in batch:
        mine = [(event.kind, next(verdicts)) for event in events]
        refused = [verdict.event_id for _, verdict in mine if verdict.status == "refused"]
        if refused:
            _reject(report, row, ErasedError(refused[0]), settings, options)
            continue
        fresh = [kind for kind, verdict in mine if verdict.status == "accepted"]
        report.events.update(fresh)
        report.imported += bool(fresh)
        report.duplicates += not fresh
    if batch and options.on_progress is not None:
        options.on_progress(batch[-1][0].end)


def _reject(report: ImportReport, row: Row, error: InputError, settings: Settings, options: ImportOptions) -> None:
    shown = repr(error.value)[: settings.intake.shown_value_chars]
    problem = Problem(row.number, error.field, shown, error.rule, row.value)
    report.rejected += 1
    if len(report.problems) < settings.intake.shown_problems:
        report.problems.append(problem)
    if options.on_problem is not None:
        options.on_problem(problem)


def _up_to_a_whole_row(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows up to and with the first that could be parsed: the format is told from that one."""
    for row in rows:
        yield row
        if row.error is None:
            return
