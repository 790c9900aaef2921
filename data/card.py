"""The dataset card: what a person should know about a dataset, as Markdown beside its manifest."""

from collections.abc import Iterator

from data.manifest import Manifest
from data.split import SPLITS


def dataset_card(manifest: Manifest) -> str:
    """The card of a dataset."""
    return "\n".join(_lines(manifest)) + "\n"


def _lines(manifest: Manifest) -> Iterator[str]:
    yield f"# Dataset {manifest.dataset_id}"
    yield ""
    yield f"- hash `{manifest.dataset_hash}`, schema {manifest.schema_version}"
    yield f"- tenant `{manifest.tenant}`, workspace `{manifest.workspace}`, agent `{manifest.agent or 'all'}`"
    yield f"- interactions from {manifest.time_range[0]} to {manifest.time_range[1]}"
    yield f"- made {manifest.created_at} by code {manifest.git_commit or 'outside a repository'}"
    yield ""
    yield "## Examples"
    yield ""
    yield f"| kind | {' | '.join(SPLITS)} |"
    yield f"|---|{'---|' * len(SPLITS)}"
    for kind, counts in manifest.counts.items():
        yield f"| {kind} | {' | '.join(str(counts[split]) for split in SPLITS)} |"
    yield ""
    yield "## Stages"
    yield ""
    yield "| stage | rows in | rows out | dropped |"
    yield "|---|---|---|---|"
    for stage in manifest.stages:
        reasons = ", ".join(f"{reason} {number}" for reason, number in stage.dropped.items()) or "-"
        yield f"| {stage.name} | {stage.rows_in} | {stage.rows_out} | {reasons} |"
    yield ""
    yield "Structured personal data was replaced by placeholders; names and places were not looked for."
    yield "Users are split by a keyed hash; no user and no near-duplicate question is in two splits."
