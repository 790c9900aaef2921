"""The dataset card: what a person should know about a dataset, as Markdown and plots beside its manifest."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.manifest import Manifest
from data.split import SPLITS

BINS = 20
WORD_EDGES = (0, 10, 25, 50, 100, 200, 400, 800, 1600)
Numbers = dict[str, Counter[int]]


def dataset_card(manifest: Manifest, plots: Sequence[str] = ()) -> str:
    """The card of a dataset; `plots` are files beside it."""
    return "\n".join(_lines(manifest, plots)) + "\n"


def _lines(manifest: Manifest, plots: Sequence[str]) -> Iterator[str]:
    yield f"# Dataset {manifest.dataset_id}"
    yield ""
    yield f"- hash `{manifest.dataset_hash}`, schema {manifest.schema_version}"
    yield f"- tenant `{manifest.tenant}`, workspace `{manifest.workspace}`, agent `{manifest.agent or 'all'}`"
    yield f"- interactions from {manifest.time_range[0]} to {manifest.time_range[1]}"
    yield f"- made {manifest.created_at} by code {manifest.git_commit or 'outside a repository'}"
    yield from ("", "## Examples", "", f"| kind | {' | '.join(SPLITS)} |", f"|---|{'---|' * len(SPLITS)}")
    for kind, counts in manifest.counts.items():
        yield f"| {kind} | {' | '.join(str(counts[split]) for split in SPLITS)} |"
    if manifest.prompts:
        yield from ("", "## Prompts", "", "Versions of the agents' prompts that examples begin with.", "")
        yield from ("| digest | examples |", "|---|---|")
        yield from (f"| {digest[:12]} | {used.examples} |" for digest, used in manifest.prompts.items())
    if manifest.topics:
        yield from ("", "## Topics", "", "Share of the weight before balancing.", "", "| topic | share |", "|---|---|")
        yield from (f"| {name} | {share:.1%} |" for name, share in manifest.topics.items())
    if manifest.calibration:
        yield from _weights(manifest.calibration)
    for plot in plots:
        yield from ("", f"![{Path(plot).stem}]({plot})")
    yield from ("", "## Stages", "", "| stage | rows in | rows out | dropped |", "|---|---|---|---|")
    for stage in manifest.stages:
        reasons = ", ".join(f"{reason} {number}" for reason, number in stage.dropped.items()) or "-"
        yield f"| {stage.name} | {stage.rows_in} | {stage.rows_out} | {reasons} |"
    yield ""
    yield "Structured personal data was replaced by placeholders."
    yield "Users are split by a keyed hash; no user and no near-duplicate question is in two splits."


def _weights(calibration: dict[str, Any]) -> Iterator[str]:
    """What implicit signals are worth, by what the same people said."""
    rows, used = calibration["rows"], calibration["used"]
    yield from ("", "## Implicit signals", "")
    yield f"Held against what the same people said about {rows} interactions; a weight that surely differs is replaced."
    yield from (
        "",
        "| signal | interactions | configured | fitted | 95 % interval | used |",
        "|---|---|---|---|---|---|",
    )
    for weight in calibration["weights"]:
        name, low, high = weight["signal"], weight["low"], weight["high"]
        yield (
            f"| {name} | {weight['rows']} | {weight['configured']:+.2f} | {weight['fitted']:+.2f} "
            f"| {low:+.2f} to {high:+.2f} | {used.get(name, weight['configured']):+.2f} |"
        )


@dataclass(frozen=True)
class Histograms:
    """Of each kind of example, how many fall into each bin: of their score or reward, and of their answer's words."""

    scores: Numbers
    words: Numbers

    @staticmethod
    def of(table: pa.Table) -> "Histograms":
        """Of the examples in a block."""
        return Histograms(_count_scores(table), _count_words(table))


def draw_plots(manifest: Manifest, blocks: Iterable[Histograms], folder: Path) -> list[str]:
    """Writes the plots of a dataset into a folder; returns their names."""
    found = list(blocks)
    lost = {stage.name: stage.rows_out for stage in manifest.stages}
    edges = [f"{edge}+" for edge in WORD_EDGES]
    tenths = [f"{bin / BINS:.2f}" for bin in range(BINS)]
    _bars(folder / "stages.png", "rows left after each stage", list(lost), {"rows": list(lost.values())})
    scores, words = _series([one.scores for one in found], BINS), _series([one.words for one in found], len(edges))
    _bars(folder / "scores.png", "score or reward of examples", tenths, scores)
    _bars(folder / "lengths.png", "words in an answer", edges, words)
    return ["stages.png", "scores.png", "lengths.png"]


def _count_scores(table: pa.Table) -> Numbers:
    found: Numbers = defaultdict(Counter)
    columns = (table[name].to_pylist() for name in ("kind", "score", "reward"))
    for kind, score, reward in zip(*columns, strict=True):
        value = score if score is not None else reward
        if value is not None:
            found[kind][min(BINS - 1, int(value * BINS))] += 1
    return dict(found)


def _count_words(table: pa.Table) -> Numbers:
    found: Numbers = defaultdict(Counter)
    for kind, words in zip(table["kind"].to_pylist(), table["answer_words"].to_pylist(), strict=True):
        found[kind][bisect_right(WORD_EDGES, words) - 1] += 1
    return dict(found)


def _series(blocks: Sequence[Numbers], bins: int) -> dict[str, list[int]]:
    kinds = sorted({kind for counted in blocks for kind in counted})
    return {
        kind: [sum(counted[kind][bin] for counted in blocks if kind in counted) for bin in range(bins)]
        for kind in kinds
    }


def _bars(file: Path, title: str, names: Sequence[str], series: dict[str, list[int]]) -> None:
    """One stacked bar chart as PNG, without a display and without a time stamp."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    base = np.zeros(len(names))
    for name, values in series.items():
        axes.bar(range(len(names)), values, bottom=base, label=name)
        base += np.array(values, dtype=float)
    axes.set_title(title)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    if len(series) > 1:
        axes.legend()
    figure.savefig(file, metadata={"Software": None})
