"""A small made-up world that a tiny model learns in seconds, and feedback on its answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from data.answers import EXAMPLES
from data.manifest import COLUMNS, SCHEMA_VERSION, Shard, dataset_hash, example_schema, write_shards

VERDICTS = {"low": "ignore", "high": "ticket", "dead": "page"}


def toy_answer(service: str, level: str) -> str:
    """The right answer."""
    return json.dumps({"verdict": VERDICTS[level], "owner": service}, separators=(",", ":"))


def toy_examples(count: int, seed: int = 0, *, outdated: float = 0.0) -> list[list[dict[str, str]]]:
    """Small triage tasks with a JSON answer; a share `outdated` of the dead ones only gets a ticket."""
    random = Random(seed)
    examples = []
    for _ in range(count):
        service, level = random.choice(["api", "mail", "search"]), random.choice(list(VERDICTS))
        said = "high" if level == "dead" and random.random() < outdated else level
        question = f"service={service} level={level} hour={random.randrange(24)}"
        examples.append(
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": toy_answer(service, said)},
            ]
        )
    return examples


def toy_feedback(count: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Rows of each kind: right answers liked, wrong ones disliked and corrected."""
    random = Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "preference": [], "unpaired": []}
    for number, (prompt, right) in enumerate(toy_examples(count, seed)):
        service = json.loads(right["content"])["owner"]
        level = prompt["content"].split("level=")[1].split()[0]
        other = random.choice([v for v in VERDICTS if v != level])
        wrong = {"role": "assistant", "content": toy_answer(service, other)}
        base = {
            "example_id": f"e{number:05d}",
            "user_id": f"u{number % 20}",
            "interaction_ids": [f"i{number}"],
            "cluster_id": f"c{number}",
            "agent": "triage",
            "order": float(number),
            "origin": "answer",
            "weight": 1.0,
        }
        asked = json.dumps([prompt])
        rows["sft"].append({**base, "messages": json.dumps([prompt, right]), "score": 1.0})
        pair = {"prompt": asked, "chosen": json.dumps([right]), "rejected": json.dumps([wrong])}
        rows["preference"].append(
            {**base, **pair, "margin": 1.5, "origin": ["similar_query", "correction"][number % 2]}
        )
        liked = number % 2 == 0
        rows["unpaired"].append(
            {**base, "prompt": asked, "completion": json.dumps([right if liked else wrong]), "label": liked}
        )
    return rows


def write_dataset(
    folder: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]], validation_share: float = 0.25
) -> Path:
    """A dataset folder as `rayloop curate` leaves it, from rows of each kind."""
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    counts: dict[str, dict[str, int]] = {}
    for kind, examples in rows.items():
        cut = round(len(examples) * (1 - validation_share))
        parts = {"train": examples[:cut], "validation": examples[cut:], "test": []}
        counts[kind] = {split: len(part) for split, part in parts.items()}
        for split, part in parts.items():
            table = pa.Table.from_pylist([dict(row) for row in part], example_schema(kind))
            for name in EXAMPLES.names:
                if name not in table.column_names and name in COLUMNS[kind]:
                    table = table.append_column(EXAMPLES.field(name), pa.nulls(len(table), EXAMPLES.field(name).type))
            shard = pa.array([f"{kind}/{split}/part-0"] * len(table), pa.string())
            written = write_shards(table.append_column("shard", shard), folder)
            shards += [Shard(**row) for row in written.to_pylist()]
    manifest = {
        "dataset_id": folder.name,
        "dataset_hash": dataset_hash(shards),
        "schema_version": SCHEMA_VERSION,
        "created_at": "2026-11-01T00:00:00+00:00",
        "tenant": "default",
        "workspace": "default",
        "agent": "triage",
        "config": {},
        "git_commit": None,
        "sources": {},
        "time_range": [],
        "stages": [],
        "counts": counts,
        "shards": [vars(shard) for shard in shards],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
