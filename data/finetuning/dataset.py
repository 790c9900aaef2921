"""From uploaded fine-tuning files to a dataset like any other: scrubbed, with manifest and hash.

The training file is the split `train`, the validation file the split `validation`; a question that is in both
stays in validation only. Each assistant message that is to be learned becomes an example of its own, with the
turns before it as its prompt; an item becomes a task, with the fields that its grader reads.
"""

import hashlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
from sqlalchemy.engine import Engine

from cluster.clock import now_us, to_iso
from cluster.errors import DatasetError
from cluster.settings import Settings
from data import manifest
from data.card import dataset_card
from data.finetuning.rows import Json, learned
from data.finetuning.uploads import StoredFile
from data.join import to_json
from data.manifest import Manifest, Shard
from data.publish import publish_upload
from data.rows import read_rows
from data.scrub import SCRUBBED, scrub
from data.stages import StageCount

KINDS: dict[str, str] = {"chat": "sft", "preference": "preference", "item": "task"}
"""Format of a file -> kind of its examples."""
TEXTS = pa.schema([(name, pa.string()) for name in SCRUBBED] + [("answer_logprob", pa.float64()), ("line", pa.int64())])


@dataclass(frozen=True)
class Part:
    """One file and the split it becomes."""

    split: str
    stored: StoredFile
    path: Path


def package(engine: Engine, settings: Settings, parts: Sequence[Part], *, agent: str | None) -> Manifest:
    """Write the dataset of these files and tell of it; the same files give the same dataset.

    Raises:
        DatasetError: nothing is left to train on, with what became of the lines.
        ConflictError: an erasure looks for datasets; try again.
    """
    kind = _kind(parts[0].stored)
    counted = _Counted()
    examples = [example for part in parts for example in _examples(part, kind, settings, agent, counted)]
    examples = _apart(examples, counted)
    by_kind = {kind: examples} | ({"sft": [_liked(example) for example in examples]} if kind == "preference" else {})
    counts = manifest.count_table([(name, e["split"], 1) for name, rows in by_kind.items() for e in rows])
    if not counts[kind]["train"]:
        reasons = [f"{stage.name}: {reason} {n}" for stage in counted.stages() for reason, n in stage.dropped.items()]
        raise DatasetError(f"no line of the training file is left to train on ({'; '.join(reasons)})")
    root = manifest.datasets_root(settings)
    building = root / f".building-{uuid.uuid4().hex}"
    building.mkdir(parents=True)
    try:
        shards = [shard for name, rows in by_kind.items() for shard in _write(rows, name, building)]
        made = _manifest(settings, parts, agent, counted.stages(), counts, shards)
        (building / "card.md").write_text(dataset_card(made))
        return publish_upload(engine, settings, building, root, made)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _kind(stored: StoredFile) -> str:
    if stored.format not in KINDS:
        raise DatasetError(f"file {stored.filename!r} is no training file; no dataset can be made of it")
    return KINDS[stored.format]


class _Counted:
    """Rows in, rows out and reasons of each stage, over all files."""

    def __init__(self) -> None:
        self._stages: dict[str, tuple[int, int, dict[str, int]]] = {}

    def add(self, stage: str, rows_in: int, rows_out: int, dropped: dict[str, int]) -> None:
        """Count what a stage did with one file."""
        before = self._stages.get(stage, (0, 0, {}))
        reasons = {name: before[2].get(name, 0) + dropped.get(name, 0) for name in {**before[2], **dropped}}
        self._stages[stage] = (before[0] + rows_in, before[1] + rows_out, dict(sorted(reasons.items())))

    def stages(self) -> list[StageCount]:
        """In the order in which they were first counted."""
        return [StageCount(name, *values) for name, values in self._stages.items()]


def _examples(part: Part, kind: str, settings: Settings, agent: str | None, counted: _Counted) -> Iterator[Json]:
    rows = [(row.number, row.value) for row in read_rows(part.path)]
    texts = pa.Table.from_pylist([_texts(line, value, kind) for line, value in rows], TEXTS)
    clean, dropped = scrub(texts, settings.curation.scrub)
    counted.add("scrub", len(texts), len(clean), dict(dropped))
    made = 0
    for row in clean.to_pylist():
        for content in _contents(row, kind):
            made += 1
            yield _example(part, kind, agent, row["line"], content)
    counted.add("examples", len(clean), made, {})


def _texts(line: int, value: Json, kind: str) -> Json:
    """One line in the columns that are scrubbed."""
    asked, rest = value, None
    if kind == "preference":
        asked = value["input"]
        answers = {"chosen": value["preferred_output"], "rejected": value["non_preferred_output"]}
        rest = {name: [_plain(message) for message in said] for name, said in answers.items()}
    elif kind == "task":
        rest = {name: field for name, field in value.items() if name not in ("messages", "tools")}
    return {
        "line": line,
        "messages": to_json([_plain(message) for message in asked["messages"]]),
        "response": to_json(rest) if rest else None,
        "tools": to_json(asked["tools"]) if asked.get("tools") else None,
    }


def _plain(message: Json) -> Json:
    """A message as chat templates know it: `developer` is the later name of `system`."""
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role}


def _contents(row: Json, kind: str) -> Iterator[Json]:
    """The columns of the examples that one scrubbed line makes."""
    messages = orjson.loads(row["messages"])
    common = {"tools": row["tools"], "weight": 1.0}
    if kind == "preference":
        answers = orjson.loads(row["response"])
        chosen, rejected = (to_json(_bare(answers[name])) for name in ("chosen", "rejected"))
        yield {"prompt": to_json(_bare(messages)), "chosen": chosen, "rejected": rejected, "margin": 1.0, **common}
        return
    if kind == "task":
        yield {"prompt": to_json(_bare(messages)), "item": row["response"] or "{}", **common}
        return
    for end, message in enumerate(messages, 1):
        if learned(message):
            yield {"messages": to_json(_bare(messages[:end])), "score": 1.0, **common}


def _bare(messages: Sequence[Json]) -> list[Json]:
    return [{name: value for name, value in message.items() if name != "weight"} for message in messages]


def _example(part: Part, kind: str, agent: str | None, line: int, content: Json) -> Json:
    prompt = content.get("prompt") or to_json(orjson.loads(content["messages"])[:-1])
    identity = to_json([kind, part.split, part.stored.sha256, line, content])
    return {
        "split": part.split,
        "example_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "user_id": f"file:{part.stored.sha256[:16]}",
        "interaction_ids": [f"file:{part.stored.sha256[:16]}:{line}"],
        "cluster_id": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "agent": agent,
        "order": float(line),
        "origin": "upload",
        **content,
    }


def _liked(example: Json) -> Json:
    """The preferred answer of a pair as one to imitate: SFT on the same feedback learns from it."""
    messages = to_json([*orjson.loads(example["prompt"]), *orjson.loads(example["chosen"])])
    identity = to_json(["sft", example["example_id"]])
    kept = {name: value for name, value in example.items() if name not in ("prompt", "chosen", "rejected", "margin")}
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return {**kept, "example_id": digest, "messages": messages, "score": 1.0}


def _apart(examples: list[Json], counted: _Counted) -> list[Json]:
    """Without those training examples whose question is in validation."""
    held_out = {example["cluster_id"] for example in examples if example["split"] == "validation"}
    kept = [e for e in examples if e["split"] == "validation" or e["cluster_id"] not in held_out]
    dropped = len(examples) - len(kept)
    counted.add("split", len(examples), len(kept), {"question in validation": dropped} if dropped else {})
    return kept


def _write(examples: Sequence[Json], kind: str, folder: Path) -> list[Shard]:
    schema = manifest.example_schema(kind)
    shards: list[Shard] = []
    for split in ("train", "validation"):
        rows = [{name: example.get(name) for name in schema.names} for example in examples if example["split"] == split]
        if not rows:
            continue
        table = pa.Table.from_pylist(rows, schema)
        named = table.append_column("shard", pa.array([f"{kind}/{split}/00000"] * len(rows), pa.string()))
        shards += [Shard(**row) for row in manifest.write_shards(named, folder).to_pylist()]
    return shards


def _manifest(
    settings: Settings,
    parts: Sequence[Part],
    agent: str | None,
    stages: list[StageCount],
    counts: dict[str, dict[str, int]],
    shards: list[Shard],
) -> Manifest:
    digest = manifest.dataset_hash(shards)
    times = [to_iso(part.stored.created_at_us) for part in parts]
    files: list[dict[str, Any]] = [
        {"split": part.split, "filename": part.stored.filename, "sha256": part.stored.sha256} for part in parts
    ]
    return Manifest(
        dataset_id=f"upload-{settings.tenant}-{digest[:12]}",
        dataset_hash=digest,
        schema_version=manifest.SCHEMA_VERSION,
        created_at=to_iso(now_us()),
        tenant=settings.tenant,
        workspace=settings.workspace,
        agent=agent,
        config={"scrub": settings.curation.scrub.model_dump(mode="json")},
        git_commit=manifest.git_commit(),
        sources={"files": files},
        time_range=[min(times), max(times)],
        stages=stages,
        counts=counts,
        shards=shards,
    )
