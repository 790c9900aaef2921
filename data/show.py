"""Datasets and their checks as text for people and as JSON for programs."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from data.manifest import Manifest
from data.split import SPLITS
from data.stages import StageCount
from data.validate import Check

MARKS = {"passed": "ok", "warning": "look", "failed": "FAIL"}


def as_json(manifest: Manifest) -> dict[str, Any]:
    """Everything in the manifest, and where it lies."""
    return asdict(manifest)


def to_line(manifest: Manifest) -> str:
    """One line: id, time, sizes."""
    sizes = ", ".join(f"{manifest.total(kind)} {kind}" for kind in manifest.counts)
    return f"{manifest.dataset_id}  {manifest.created_at[:19]}  {sizes}"


def to_text(manifest: Manifest) -> str:
    """Stages and counts as tables."""
    lines = [f"dataset {manifest.dataset_id}", f"hash {manifest.dataset_hash}", f"at {manifest.path}", ""]
    lines += [
        f"{'stage':12} {'in':>8} {'out':>8}  dropped",
        *(_stage_line(stage) for stage in manifest.stages),
    ]
    lines += ["", f"{'kind':12}" + "".join(f"{split:>12}" for split in SPLITS)]
    for kind, counts in manifest.counts.items():
        lines.append(f"{kind:12}" + "".join(f"{counts[split]:>12}" for split in SPLITS))
    return "\n".join(lines)


def _stage_line(stage: StageCount) -> str:
    reasons = ", ".join(f"{reason} {number}" for reason, number in stage.dropped.items())
    return f"{stage.name:12} {stage.rows_in:>8} {stage.rows_out:>8}  {reasons}".rstrip()


def check_line(check: Check) -> str:
    """One line: verdict, check, what was found, a few examples."""
    shown = f" ({', '.join(check.examples)})" if check.examples else ""
    return f"{MARKS[check.status]:5} {check.name}: {check.detail}{shown}"


def checks_as_json(manifest: Manifest, checks: Iterable[Check]) -> dict[str, Any]:
    """The dataset and its checks."""
    listed = [asdict(check) for check in checks]
    passed = all(check["status"] != "failed" for check in listed)
    return {"dataset_id": manifest.dataset_id, "passed": passed, "checks": listed}
