"""Describes sources before they are imported: columns, empties, relations, labels and how hard they are.

The report is a plain dict, for `--json`; `to_markdown` writes it for people. Nested objects count as
columns of their own (`answer.is_correct`), lists do not.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.settings import Settings
from cluster.settings.capture import AuditSettings
from data.importers.baselines import baseline_scores
from data.importers.source import ForeignKey, Source
from data.rows import Row

Report = dict[str, Any]


@dataclass(slots=True)
class Column:
    """What a pass over the rows gathers of one column."""

    present: int = 0
    empty: int = 0
    types: Counter[str] = field(default_factory=Counter)
    values: Counter[Any] = field(default_factory=Counter)
    """Distinct short values, up to a limit."""
    more_values: bool = False
    lengths: list[int] = field(default_factory=list)
    low: float | None = None
    high: float | None = None

    def add(self, value: Any, settings: AuditSettings) -> None:
        """Take one value in."""
        self.present += 1
        self.types[type(value).__name__] += 1
        if value is None or value in ("", [], {}):
            self.empty += 1
            return
        if isinstance(value, str | list):
            self.lengths.append(len(value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.low = value if self.low is None else min(self.low, value)
            self.high = value if self.high is None else max(self.high, value)
        self._count(value, settings)

    def _count(self, value: Any, settings: AuditSettings) -> None:
        if isinstance(value, list | dict):
            return
        if value not in self.values and len(self.values) >= settings.max_distinct:
            self.more_values = True
            return
        self.values[value] += 1


@dataclass(slots=True)
class Table:
    """One source, read once."""

    name: str
    rows: int = 0
    bad_rows: int = 0
    columns: dict[str, Column] = field(default_factory=dict)
    sample: list[dict[str, Any]] = field(default_factory=list)
    """The first rows, flattened, for the baselines."""


def audit_sources(sources: Sequence[Source], settings: Settings) -> Report:
    """Everything worth knowing about some files or tables before they are imported.

    Raises:
        InputError: a source is missing, or damaged beyond its rows.
        UnavailableError: its server does not answer.
    """
    tables = [_read(source, settings.audit) for source in sources]
    declared = [_declared(source.name, key) for source in sources for key in source.foreign_keys]
    known = {(relation["from"], relation["to"]) for relation in declared}
    found = _relations(tables, settings.audit)
    return {
        "sources": [_describe(table, settings.audit) for table in tables],
        "empty": [table.name for table in tables if not table.rows],
        "relations": [*declared, *(r for r in found if not {(r["from"], r["to"]), (r["to"], r["from"])} & known)],
    }


def _declared(name: str, key: ForeignKey) -> Report:
    return {"from": f"{name}:{key.column}", "to": f"{key.table}:{key.other}", "declared": True}


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects, with dotted names."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _read(source: Source, settings: AuditSettings) -> Table:
    table = Table(source.name)
    for row in source.rows():
        table.rows += 1
        _add(table, row, settings)
    return table


def _add(source: Table, row: Row, settings: AuditSettings) -> None:
    if row.error is not None or not isinstance(row.value, dict):
        source.bad_rows += 1
        return
    flat = dict(flatten(row.value))
    for name, value in flat.items():
        source.columns.setdefault(name, Column()).add(value, settings)
    if len(source.sample) < settings.baseline_rows:
        source.sample.append(flat)


def _describe(source: Table, settings: AuditSettings) -> Report:
    labels = [name for name, column in source.columns.items() if _is_label(column, settings)]
    return {
        "name": source.name,
        "rows": source.rows,
        "bad_rows": source.bad_rows,
        "columns": [_describe_column(n, c, source.rows) for n, c in source.columns.items()],
        "labels": [_describe_label(name, source, settings) for name in labels],
    }


def _describe_column(name: str, column: Column, rows: int) -> Report:
    return {
        "name": name,
        "types": dict(column.types),
        "filled": column.present - column.empty,
        "filled_share": round((column.present - column.empty) / rows, 4),
        "distinct": None if column.more_values or not column.values else len(column.values),
        "median_length": statistics.median(column.lengths) if column.lengths else None,
        "min": column.low,
        "max": column.high,
    }


def _is_label(column: Column, settings: AuditSettings) -> bool:
    """Few values, each of them seen often: true or false, a verdict, a rating."""
    counted = sum(column.values.values())
    return (
        not column.more_values
        and 2 <= len(column.values) <= settings.max_label_values
        and counted >= settings.min_label_repeats * len(column.values)
    )


def _describe_label(name: str, source: Table, settings: AuditSettings) -> Report:
    column = source.columns[name]
    total = sum(column.values.values())
    balance = {str(v): round(n / total, 4) for v, n in column.values.most_common()}
    text = _text_beside(name, source)
    rows = [(r[name], r[text]) for r in source.sample if text in r and r.get(name) is not None] if text else []
    return {
        "name": name,
        "balance": balance,
        "text": text,
        "baselines": baseline_scores([label for label, _ in rows], [text for _, text in rows], settings),
    }


def _text_beside(label: str, source: Table) -> str | None:
    """The longest text column that shares the label's object, or else the longest of all."""
    texts = {
        name: statistics.median(column.lengths)
        for name, column in source.columns.items()
        if set(column.types) == {"str"} and column.lengths
    }
    parent = label.rpartition(".")[0]
    beside = {name: length for name, length in texts.items() if parent and name.startswith(f"{parent}.")}
    candidates = beside or texts
    return max(candidates, key=lambda name: candidates[name], default=None)


def _relations(sources: list[Table], settings: AuditSettings) -> Iterator[Report]:
    """Pairs of columns of two files where most values of one occur in the other."""
    for place, first in enumerate(sources):
        for second in sources[place + 1 :]:
            for one, column in first.columns.items():
                for two, other in second.columns.items():
                    shared = column.values.keys() & other.values.keys()
                    smaller = min(len(column.values), len(other.values))
                    if smaller < settings.min_relation_values or len(shared) / smaller < settings.relation_share:
                        continue
                    yield {
                        "from": f"{first.name}:{one}",
                        "to": f"{second.name}:{two}",
                        "shared_values": len(shared),
                        "share": round(len(shared) / smaller, 4),
                    }


def to_markdown(report: Report) -> str:
    """The report for people."""
    lines = ["# Audit", "", "| source | rows | unreadable | columns | labels |", "|---|---|---|---|---|"]
    lines += [
        f"| {s['name']} | {s['rows']} | {s['bad_rows']} | {len(s['columns'])} | "
        f"{', '.join(label['name'] for label in s['labels']) or 'none'} |"
        for s in report["sources"]
    ]
    if report["empty"]:
        lines += ["", f"Empty: {', '.join(report['empty'])}."]
    for source in report["sources"]:
        lines += ["", f"## {source['name']}", "", f"{source['rows']} rows, {source['bad_rows']} unreadable."]
        lines += [
            "",
            "| column | types | filled | distinct | median length | range |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_column_line(column) for column in source["columns"]]
        empty = [c["name"] for c in source["columns"] if not c["filled"]]
        if empty:
            lines += ["", f"Empty: {', '.join(empty)}."]
        for label in source["labels"]:
            lines += ["", *_label_lines(label)]
    lines += ["", "## Relations", ""]
    lines += [
        f"- `{r['from']}` refers to `{r['to']}` (declared)"
        if r.get("declared")
        else f"- `{r['from']}` and `{r['to']}` share {r['shared_values']} values ({r['share']:.0%})"
        for r in report["relations"]
    ] or ["None found."]
    return "\n".join(lines) + "\n"


def _column_line(column: Report) -> str:
    types = ", ".join(column["types"])
    distinct = "many" if column["distinct"] is None else column["distinct"]
    length = "" if column["median_length"] is None else f"{column['median_length']:g}"
    span = "" if column["min"] is None else f"{column['min']:g} to {column['max']:g}"
    return f"| {column['name']} | {types} | {column['filled_share']:.1%} | {distinct} | {length} | {span} |"


def _label_lines(label: Report) -> list[str]:
    balance = ", ".join(f"{value} {share:.1%}" for value, share in label["balance"].items())
    lines = [f"Label `{label['name']}`: {balance}."]
    if label["baselines"]:
        lines += ["", f"Baselines from `{label['text']}`, macro averages:", ""]
        lines += ["| baseline | rows | precision | recall | F1 |", "|---|---|---|---|---|"]
        lines += [
            f"| {b['name']} | {b['rows']} | {b['precision']:.3f} | {b['recall']:.3f} | {b['f1']:.3f} |"
            for b in label["baselines"]
        ]
    return lines
