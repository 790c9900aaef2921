"""What is left of a demo: `summary.json` for programs, `report.md` and `report.html` with plots for people."""

import base64
import html
import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.demo.held_out import Accuracy, Share


@dataclass(frozen=True)
class Row:
    """One line of the table at the end."""

    name: str
    version: str | None
    accuracy: Accuracy
    note: str = ""


@dataclass(frozen=True)
class Moment:
    """What the router said at one time during a rollout."""

    seconds: float
    share: float
    version: str


@dataclass
class Findings:
    """Everything the report is made of."""

    seed: int
    shuffled: bool
    simulated: str
    rows: list[Row] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    """One evaluation each, as `rayloop evaluate --json` printed it."""
    moments: list[Moment] = field(default_factory=list)
    traffic: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    promoted: str | None = None
    rolled_back: str | None = None
    rolled_back_reason: str = ""
    why_not: str = ""
    """Why nothing was promoted, where nothing was."""
    why_kept: str = ""
    """Why the damaged version was not rolled back, where it was not."""
    loop_seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row | None:
        """The line of the table with this name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def inconclusive(self) -> str:
        """Why the run shows nothing although every part worked; empty where it ended as it should."""
        if self.shuffled:
            return f"{self.promoted} was promoted on shuffled feedback" if self.promoted else ""
        if self.promoted is None:
            return f"nothing was promoted: {self.why_not}"
        return "" if self.rolled_back else f"the damaged version was not rolled back: {self.why_kept}"

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        base, promoted = self.row("base"), self.row("promoted")
        return {
            "seed": self.seed,
            "shuffle_feedback": self.shuffled,
            "base_accuracy": base.accuracy.verdict.value if base else None,
            "promoted_accuracy": promoted.accuracy.verdict.value if promoted else None,
            "promoted_version": self.promoted,
            "rolled_back_version": self.rolled_back,
            "loop_seconds": round(self.loop_seconds, 1),
            "stages": self.stages,
            "held_out": [
                {"name": r.name, "version": r.version, "note": r.note, **asdict(r.accuracy)} for r in self.rows
            ],
            "why_not_promoted": self.why_not or None,
            "rolled_back_reason": self.rolled_back_reason or None,
            "inconclusive": self.inconclusive or None,
            "simulated": self.simulated,
            "urls": self.urls,
        }


def write(findings: Findings, folder: Path) -> dict[str, Path]:
    """Write all three files; returns where they are."""
    plots = {
        "accuracy": _accuracy_plot(findings),
        "rollout": _rollout_plot(findings),
        "time": _time_plot(findings),
    }
    paths = {name: folder / f"report.{name}" for name in ("md", "html")} | {"json": folder / "summary.json"}
    paths["json"].write_text(json.dumps(findings.summary(), indent=1) + "\n", encoding="utf-8")
    for name, picture in plots.items():
        if picture:
            (folder / f"{name}.png").write_bytes(picture)
    paths["md"].write_text(markdown(findings, {n: f"{n}.png" for n, p in plots.items() if p}), encoding="utf-8")
    embedded = {n: "data:image/png;base64," + base64.b64encode(p).decode() for n, p in plots.items() if p}
    paths["html"].write_text(_html(findings, embedded), encoding="utf-8")
    return paths


def percent(share: Share) -> str:
    """A share with its interval, in percent."""
    if math.isnan(share.value):
        return "-"
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def outcome(findings: Findings) -> str:
    """What happened, in a sentence or two."""
    base, promoted = findings.row("base"), findings.row("promoted")
    if findings.promoted is None:
        return f"Nothing was promoted: {findings.why_not}"
    sentence = f"{findings.promoted} was promoted"
    if base and promoted:
        before, after = base.accuracy.verdict.value, promoted.accuracy.verdict.value
        sentence += f": {100 * before:.1f} % → {100 * after:.1f} % right on alerts nothing had seen"
    if findings.rolled_back:
        sentence += f". The damaged {findings.rolled_back} was rolled back: {findings.rolled_back_reason}"
    elif findings.why_kept:
        sentence += f". The damaged version was not rolled back: {findings.why_kept}"
    return sentence + "."


def sections(findings: Findings) -> list[tuple[str, list[list[str]]]]:
    """The tables of the report: a title and rows, the first of which is the header."""
    held_out = [["version", "", "verdict right, % (95 %)", "verdict and owner, %", "valid answers, %", ""]]
    held_out += [
        [
            r.name,
            r.version or "",
            percent(r.accuracy.verdict),
            percent(r.accuracy.both),
            percent(r.accuracy.valid),
            r.note,
        ]
        for r in findings.rows
    ]
    tables = [
        ("Held-out alerts, before and after", held_out),
        ("Gates, on recorded feedback only", _gate_table(findings)),
    ]
    shown = [["stage", "seconds"], *[[name, f"{seconds:.1f}"] for name, seconds in findings.stages.items()]]
    tables.append(("Where the time went", [*shown, ["the loop", f"{findings.loop_seconds:.1f}"]]))
    if findings.urls:
        tables.append(("Where to look", [["what", "address"], *[[n, u] for n, u in findings.urls.items()]]))
    return [(title, rows) for title, rows in tables if len(rows) > 1]


def _gate_table(findings: Findings) -> list[list[str]]:
    """A gate a row, a version a column: there are many gates and few versions."""
    suites = list(dict.fromkeys(gate["suite"] for found in findings.gates for gate in found["gates"]))
    by_suite = [{gate["suite"]: gate for gate in found["gates"]} for found in findings.gates]
    passed = ["all of them", *("passed" if found["passed"] else "failed" for found in findings.gates)]
    rows = [[suite, *(_gate(gates.get(suite)) for gates in by_suite)] for suite in suites]
    return [["gate", *(found["version"] for found in findings.gates)], *rows, passed] if rows else [[]]


def _gate(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return ""
    value = "" if gate.get("value") is None else f" {gate['value']:.3g}"
    return f"{gate['status'].replace('_', ' ')}{value}"


def markdown(findings: Findings, pictures: dict[str, str]) -> str:
    """The report as Markdown; `pictures` are links by name."""
    parts = ["# Rayloop demo", "", outcome(findings), "", findings.simulated, ""]
    for title, rows in sections(findings):
        parts += [f"## {title}", "", *_markdown_table(rows), ""]
    parts += [f"![{name}]({link})\n" for name, link in pictures.items()]
    return "\n".join(parts)


def _markdown_table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _html(findings: Findings, pictures: dict[str, str]) -> str:
    def table(rows: list[list[str]]) -> str:
        cells = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in [("th", rows[0]), *(("td", row) for row in rows[1:])]
        ]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

    body = "".join(f"<h2>{html.escape(title)}</h2>{table(rows)}" for title, rows in sections(findings))
    images = "".join(f'<img alt="{name}" src="{link}">' for name, link in pictures.items())
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Rayloop demo</title><style>"
        "body{font:16px/1.5 system-ui;max-width:64rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;margin:.5rem 0}"
        "td,th{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:left}"
        "img{max-width:100%;margin:1rem 0}</style>"
        f"<h1>Rayloop demo</h1><p><b>{html.escape(outcome(findings))}</b></p><p>{html.escape(findings.simulated)}</p>"
        f"{body}{images}</html>\n"
    )


def _accuracy_plot(findings: Findings) -> bytes | None:
    rows = [row for row in findings.rows if not math.isnan(row.accuracy.verdict.value)]
    if not rows:
        return None
    figure, axes = _figure(height=0.5 * len(rows) + 1.2)
    for place, row in enumerate(reversed(rows)):
        share = row.accuracy.verdict
        colour = {"promoted": "#2a7f3f", "base": "#888888"}.get(row.name, "#4a78b5")
        errors = [[share.value - share.low], [share.high - share.value]]
        axes.barh(place, share.value, color=colour, xerr=errors, capsize=3)
    axes.set_yticks(range(len(rows)), [f"{row.name} {row.version or ''}" for row in reversed(rows)])
    axes.set_xlim(0, 1)
    axes.set_xlabel("verdict right on held-out alerts, with 95 % intervals")
    return _png(figure)


def _rollout_plot(findings: Findings) -> bytes | None:
    if not findings.moments:
        return None
    figure, axes = _figure(height=2.8)
    for version in dict.fromkeys(moment.version for moment in findings.moments):
        mine = [moment for moment in findings.moments if moment.version == version]
        axes.step([m.seconds for m in mine], [m.share for m in mine], where="post", label=version)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("seconds since the demo began")
    axes.set_ylabel("share of users on the candidate")
    axes.legend()
    return _png(figure)


def _time_plot(findings: Findings) -> bytes | None:
    if not findings.stages:
        return None
    figure, axes = _figure(height=0.3 * len(findings.stages) + 1.2)
    names = list(findings.stages)[::-1]
    axes.barh(names, [findings.stages[name] for name in names], color="#4a78b5")
    axes.set_xlabel("seconds")
    return _png(figure)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
