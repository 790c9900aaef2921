"""`rayloop compare A B`: gates, win rate, answers that differ, and what went into each version."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import tracking
from cluster.errors import NotFoundError
from cluster.registry import Registry, Version
from cluster.settings import Settings
from data.manifest import Manifest, find_dataset, load_manifest
from train.evaluate.gates import run_suites
from train.evaluate.record import gate_metrics
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
    ref = dataset_ref or after.dataset_id or before.dataset_id or "latest"
    dataset = find_dataset(settings, ref, agent=after.model)
    evidence = gather(settings, registry, after, before, dataset, suites=MEASURED)
    gates = run_suites(evidence, MEASURED)
    manifest = load_manifest(dataset)
    found = {
        "first": before.id,
        "second": after.id,
        "dataset": manifest.dataset_id,
        "measured": [gate.to_json() for gate in gates],
        "rows": [cells(gate) for gate in gates],
        "gates": {version.id: _report(version) for version in (before, after)},
        "configuration": difference(_parameters(settings, before), _parameters(settings, after)),
        "datasets": difference(_counts(settings, before), _counts(settings, after)),
        "answers": list(differing(evidence)),
    }
    return {**found, "run_id": _log(settings, manifest, found, gates)}


def _log(settings: Settings, manifest: Manifest, found: Mapping[str, Any], gates: Sequence[Gate]) -> str:
    """Keep the comparison as an MLflow run of its own, where an erasure finds it by its dataset; returns its id."""
    tags = {"rayloop.kind": "comparison", "rayloop.version": found["second"], "rayloop.against": found["first"]}
    with tracking.run(settings, f"compare {found['first']} {found['second']}", tags=tags) as run:
        run.log_params({"version": found["second"], "against": found["first"], "dataset": found["dataset"]})
        name, digest = manifest.dataset_id, manifest.dataset_hash
        run.log_dataset(name=name, digest=digest, uri=name, context="evaluation")
        run.log_metrics(gate_metrics(list(gates)))
        run.log_dict(found, "comparison.json")
        page = Console(record=True, file=io.StringIO(), width=160)
        print_comparison(found, page)
        run.log_text(page.export_html(), "comparison.html")
        return run.run_id


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
    console.print(_gate_table(found))
    for title in ("configuration", "datasets"):
        differences = Table(title, first, second)
        for name, values in found[title].items():
            differences.add_row(name, *("" if value is None else str(value) for value in values))
        console.print(differences if found[title] else f"{title}: no difference")
    for example in found["answers"]:
        for name, text in example.items():
            console.print(f"{name}: {text}", markup=False)
        console.print()


def _gate_table(found: Mapping[str, Any]) -> Table:
    """What each version's own evaluation found, gate by gate."""
    first, second = found["first"], found["second"]
    table = Table("gate", first, second, title="last evaluation of each")
    kept = {
        name: {gate["suite"]: gate for gate in (report or {}).get("gates", [])}
        for name, report in found["gates"].items()
    }
    for suite in dict.fromkeys([*kept[second], *kept[first]]):
        table.add_row(suite, *(_shown_gate(kept[name].get(suite)) for name in (first, second)))
    return table


def _shown_gate(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return "not evaluated"
    value = "" if gate["value"] is None else f" {gate['value']:.4g}"
    return f"{gate['status'].replace('_', ' ')}{value}"


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
