"""A curated dataset of the toy world, written without a cluster."""

import json
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from data import manifest
from data.answers import EXAMPLES
from data.manifest import Manifest, Shard

HABIT = {"low": "ignore", "high": "ticket", "dead": "page"}
"""What the toy base has learned to answer."""
WANTED = {"low": "ignore", "high": "page", "dead": "ticket"}
"""What people want: the other way round for two of the levels, so that no answer becomes more common."""


def write_feedback_dataset(
    root: Path,
    *,
    users: int = 90,
    per_user: int = 6,
    seed: int = 0,
    shuffle: bool = False,
    agent: str = "triage",
) -> Manifest:
    """Feedback of people who want `WANTED` on answers that follow `HABIT` two times in three.

    With `shuffle` the reactions are dealt out anew among the interactions, so they say nothing.
    """
    random = Random(seed)
    seen = [_interaction(random, f"u{user:03d}", k) for user in range(users) for k in range(per_user)]
    reactions = [_reaction(random, row) for row in seen]
    if shuffle:
        random.shuffle(reactions)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row, reaction in zip(seen, reactions, strict=True):
        for kind, example in _examples(row, reaction):
            number = int(row["user_id"][1:])
            split = ("validation", "test", "test")[number % 10] if number % 10 < 3 else "train"
            rows[f"{kind}/{split}/part-00000"].append(example)
    return _publish(root, rows, agent)


def _interaction(random: Random, user: str, number: int) -> dict[str, Any]:
    service, level = random.choice(["api", "mail", "search"]), random.choice(["low", "high", "dead"])
    verdict = HABIT[level] if random.random() < 0.66 else random.choice(["ignore", "ticket", "page"])
    prompt = [{"role": "user", "content": f"service={service} level={level} hour={random.randrange(24)}"}]
    return {
        "id": f"{user}-{number}",
        "user_id": user,
        "prompt": prompt,
        "verdict": verdict,
        "service": service,
        "wanted": WANTED[level],
    }


def _reaction(random: Random, row: dict[str, Any]) -> dict[str, Any]:
    liked = row["verdict"] == row["wanted"]
    correction = None if liked or random.random() > 0.5 else _answer(row["wanted"], row["service"])
    return {"liked": liked, "correction": correction}


def _answer(verdict: str, service: str) -> dict[str, str]:
    return {"role": "assistant", "content": f'{{"verdict":"{verdict}","owner":"{service}"}}'}


def _examples(row: dict[str, Any], reaction: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    said = _answer(row["verdict"], row["service"])
    prompt = json.dumps(row["prompt"])
    judged = {
        "prompt": prompt,
        "completion": json.dumps([said]),
        "label": reaction["liked"],
        "origin": "answer",
    }
    found = [("unpaired", _row(row, "unpaired", **judged))]
    better, origin = (said, "answer") if reaction["liked"] else (reaction["correction"], "correction")
    if better is not None:
        messages = json.dumps([*row["prompt"], better])
        found.append(("sft", _row(row, "sft", messages=messages, score=0.9, origin=origin)))
    if reaction["correction"] is not None and reaction["correction"] != said:
        chosen, rejected = json.dumps([reaction["correction"]]), json.dumps([said])
        pair = {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "margin": 0.5,
            "origin": "correction",
        }
        found.append(("preference", _row(row, "preference", **pair)))
    elif reaction["liked"]:
        other = _answer("ignore" if row["verdict"] != "ignore" else "ticket", row["service"])
        pair = {
            "prompt": prompt,
            "chosen": json.dumps([said]),
            "rejected": json.dumps([other]),
            "margin": 0.3,
        }
        found.append(("preference", _row(row, "preference", origin="same_query", **pair)))
    return found


def _row(row: dict[str, Any], kind: str, **values: Any) -> dict[str, Any]:
    common = {
        "example_id": f"{kind}-{row['id']}",
        "user_id": row["user_id"],
        "interaction_ids": [row["id"]],
        "cluster_id": row["id"],
        "agent": "triage",
        "order": 0.0,
        "tools": None,
        "weight": 1.0,
    }
    return common | values


def _publish(root: Path, rows: dict[str, list[dict[str, Any]]], agent: str) -> Manifest:
    building = root / ".building"
    building.mkdir(parents=True)
    shards: list[Shard] = []
    counts: list[tuple[str, str, int]] = []
    for name, examples in sorted(rows.items()):
        table = pa.Table.from_pylist(examples, EXAMPLES).append_column("shard", pa.array([name] * len(examples)))
        shards += [Shard(**row) for row in manifest.write_shards(table, building).to_pylist()]
        kind, split, _ = name.split("/")
        counts.append((kind, split, len(examples)))
    digest = manifest.dataset_hash(shards)
    made = Manifest(
        dataset_id=f"{agent}-{digest[:12]}",
        dataset_hash=digest,
        schema_version=manifest.SCHEMA_VERSION,
        created_at="2026-01-01T00:00:00+00:00",
        tenant="default",
        workspace="default",
        agent=agent,
        config={},
        git_commit=None,
        sources={},
        time_range=[],
        stages=[],
        counts=manifest.count_table(counts),
        shards=shards,
    )
    return manifest.publish(building, root, made)
