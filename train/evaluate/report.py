"""What an evaluation looks like: a table for the terminal, a report with plots for MLflow."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.tracking import Run
from train.evaluate.evidence import Evidence
from train.evaluate.types import Evaluation, Gate

STYLES = {
    "passed": "green",
    "failed": "red",
    "not_applicable": "dim",
    "no_data": "yellow",
    "waiting": "yellow",
    "could_not_run": "red",
}
COLUMNS = ("suite", "status", "value", "threshold", "interval", "detail")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.3rem .6rem;border-bottom:1px solid #ccc;text-align:left}}
pre{{white-space:pre-wrap;background:#f4f4f4;padding:.5rem}}img{{max-width:100%}}</style>{body}</html>
"""


def print_table(found: Evaluation, console: Console) -> None:
    """The gates as one table, and what follows from them."""
    table = Table(title=f"{found.version} against {found.against} ({found.prompts} held-out prompts)")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for gate in found.gates:
        suite, status, *rest = cells(gate)
        table.add_row(suite, f"[{STYLES[gate.status]}]{status}[/]", *rest)
    console.print(table)
    shown = "[green]passed[/]" if found.passed else "[red]failed[/]"
    console.print(f"{found.version} {shown}; report: MLflow run {found.run_id}")


def cells(gate: Gate) -> tuple[str, ...]:
    """A gate as the table's texts."""
    interval = f"{gate.interval[0]:.3f} - {gate.interval[1]:.3f}" if gate.interval else ""
    status = gate.status.replace("_", " ") if gate.gated else "reported"
    return gate.suite, status, _number(gate.value), _number(gate.threshold), interval, gate.detail


def write_report(run: Run, found: Evaluation, evidence: Evidence | None) -> None:
    """`report.md`, `report.html` and the plots, as artifacts of the run."""
    figure = plot(found.gates)
    run.log_text(markdown(found, evidence), "report.md")
    run.log_text(page(found, evidence, figure), "report.html")
    run.log_bytes(figure, "gates.png")


def markdown(found: Evaluation, evidence: Evidence | None) -> str:
    """The report as Markdown."""
    lines = [f"# {found.version} against {found.against}: {'passed' if found.passed else 'failed'}", ""]
    lines += _facts(found)
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells(gate))} |" for gate in found.gates]
    lines += ["", "## Cases that changed", ""]
    lines += [f"- {gate.suite}: {', '.join(gate.changed_cases)}" for gate in found.gates if gate.changed_cases]
    lines += ["", "## Answers that differ", ""]
    for example in differing(evidence):
        lines += [f"**{name}**\n\n```\n{text}\n```\n" for name, text in example.items()]
    return "\n".join(lines) + "\n"


def page(found: Evaluation, evidence: Evidence | None, figure: bytes) -> str:
    """The report as one HTML file; answers are escaped, they are not ours."""
    rows = "".join(_row(cells(gate)) for gate in found.gates)
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    image = base64.b64encode(figure).decode()
    title = f"{found.version} against {found.against}: {'passed' if found.passed else 'failed'}"
    body = f"<h1>{html.escape(title)}</h1><p>{'<br>'.join(map(html.escape, _facts(found)))}</p>"
    body += f'<table><tr>{head}</tr>{rows}</table><img alt="gates" src="data:image/png;base64,{image}">'
    body += "<h2>Answers that differ</h2>"
    for example in differing(evidence):
        body += "".join(f"<b>{html.escape(n)}</b><pre>{html.escape(t)}</pre>" for n, t in example.items())
    return PAGE.format(title=html.escape(title), body=body)


def differing(evidence: Evidence | None) -> Iterable[dict[str, str]]:
    """The first held-out prompts on which the two versions answer differently; none where nothing was asked."""
    if evidence is None:
        return
    left = evidence.settings.examples_shown
    for truth in evidence.truths:
        mine, theirs = evidence.candidate.to(truth.prompt), evidence.champion.to(truth.prompt)
        if mine != theirs and left > 0:
            left -= 1
            asked = str(truth.prompt.messages[-1].get("content", ""))
            yield {
                f"prompt {truth.example_id}": asked,
                evidence.candidate.name: mine,
                evidence.champion.name: theirs,
                f"recorded ({truth.origin})": truth.reference,
            }


def plot(gates: Sequence[Gate]) -> bytes:
    """PNG: the two versions' shares side by side, and the win rate with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    bars, wins = figure.subplots(1, 2, width_ratios=(2, 1))
    _plot_shares(bars, gates)
    _plot_wins(wins, gates)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot_shares(axes: Any, gates: Sequence[Gate]) -> None:
    shares = {
        key.removeprefix("candidate_"): (value, gate.metrics[key.replace("candidate", "champion")])
        for gate in gates
        if gate.suite == "valid_output"
        for key, value in gate.metrics.items()
        if key.startswith("candidate_")
    }
    for offset, (role, position) in enumerate((("candidate", 0), ("champion", 1))):
        heights = [pair[position] for pair in shares.values()]
        axes.bar([i + 0.4 * offset for i in range(len(shares))], heights, 0.38, label=role)
    axes.set_xticks([i + 0.2 for i in range(len(shares))], list(shares))
    axes.set(ylim=(0, 1.05), title="against recorded truth" if shares else "the task is not structured")
    if shares:
        axes.legend(loc="lower right")


def _plot_wins(axes: Any, gates: Sequence[Gate]) -> None:
    gate = next((g for g in gates if g.suite == "win_rate" and g.interval and g.value is not None), None)
    axes.axhline(0.5, color="grey", linestyle=":")
    axes.set(ylim=(0, 1), xticks=[], title="win rate" if gate else "win rate: no data")
    if gate and gate.interval and gate.value is not None:
        spread = [[gate.value - gate.interval[0]], [gate.interval[1] - gate.value]]
        axes.errorbar([0], [gate.value], yerr=spread, fmt="o", capsize=8)


def _facts(found: Evaluation) -> list[str]:
    return [
        f"dataset {found.dataset_id} ({found.dataset_hash[:12]}), {found.prompts} held-out prompts",
        f"grader {found.grader_version}",
        f"{sum(found.seconds.values()):.1f} s",
    ]


def _row(texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
