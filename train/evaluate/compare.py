"""`rayloop compare A B`: gates, win rate, answers that differ, and what went into each version."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import tracking
from cluster.errors import NotFoundError
from cluster.registry import Registry, Version
from cluster.settings import Settings
from data.manifest import find_dataset, load_manifest
from train.evaluate.gates import SUITES
from train.evaluate.report import cells, differing
from train.evaluate.run import gather, resolve_opponent
from train.evaluate.types import Gate

MEASURED = ("win_rate", "valid_output", "overlap", "perplexity")
"""Suites that are measured afresh, on the same prompts for both."""


def compare(settings: Settings, first: str, second: str, *, dataset_ref: str | None = None) -> dict[str, Any]:
    """Both versions side by side; the numbers are of the second against the first.

    Raises:
        NotFoundError: no such version or dataset.
    """
    registry = Registry(settings)
    after = registry.get(second)
    before = resolve_opponent(registry, after, first)
    dataset = find_dataset(settings, dataset_ref or after.dataset_id or before.dataset_id or "latest")
    evidence = gather(settings, registry, after, before, dataset)
    gates = [_one(SUITES[name].measure(evidence)) for name in MEASURED]
    return {
        "first": before.id,
        "second": after.id,
        "dataset": load_manifest(dataset).dataset_id,
        "measured": [gate.to_json() for gate in gates],
        "rows": [cells(gate) for gate in gates],
        "gates": {version.id: _report(version) for version in (before, after)},
        "configuration": difference(_parameters(settings, before), _parameters(settings, after)),
        "datasets": difference(_counts(settings, before), _counts(settings, after)),
        "answers": list(differing(evidence)),
    }


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What differs between two mappings: name to both values, `None` where one has none."""
    names = sorted({*first, *second})
    return {n: [first.get(n), second.get(n)] for n in names if first.get(n) != second.get(n)}


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """The comparison as tables."""
    first, second = found["first"], found["second"]
    table = Table("suite", "status", "value", "threshold", "interval", "detail")
    table.title = f"{second} against {first} on {found['dataset']}"
    for row in found["rows"]:
        table.add_row(*row)
    console.print(table)
    for title in ("configuration", "datasets"):
        differences = Table(title, first, second)
        for name, values in found[title].items():
            differences.add_row(name, *("" if value is None else str(value) for value in values))
        console.print(differences if found[title] else f"{title}: no difference")
    for example in found["answers"]:
        for name, text in example.items():
            console.print(f"{name}: {text}", markup=False)
        console.print()


def _one(found: Gate | list[Gate]) -> Gate:
    return found[0] if isinstance(found, list) else found


def _report(version: Version) -> Any:
    text = version.tags.get("rayloop.gates_report")
    return json.loads(text) if text else None


def _parameters(settings: Settings, version: Version) -> dict[str, Any]:
    """Parameters of the run that made the version, and what its tags say it stands on."""
    own = {name: version.tags.get(name) for name in ("base_model", "base_revision", "rank", "dataset_hash")}
    if not version.run_id:
        return own
    return {**tracking.client(settings).get_run(version.run_id).data.params, **own}


def _counts(settings: Settings, version: Version) -> dict[str, Any]:
    """Examples by kind and split of the dataset a version was trained on."""
    if version.dataset_id is None:
        return {}
    try:
        path: Path = find_dataset(settings, version.dataset_id)
    except NotFoundError:
        return {"dataset": f"{version.dataset_id} is not here"}
    return {"dataset": version.dataset_id, **dict(tracking.flatten(load_manifest(path).counts))}
