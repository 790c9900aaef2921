"""`rayloop data validate`: is a dataset what its manifest says, and fit to train on?

Reads shard by shard. A check passes, fails (the dataset must not be used) or warns (somebody should look).
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DatasetError
from cluster.settings import Settings
from cluster.settings.curation import CurationSettings
from data.dedup import (
    normalise_text,
    question_salts,
    question_text,
    record_fields,
    sketch_texts,
)
from data.join import to_json
from data.kept_tests import read_sketches, sketch_files
from data.manifest import Manifest, dataset_hash, example_schema
from data.minhash import text_hashes
from data.near import near_edges
from data.recognisers import find
from data.scrub_text import suspicion
from data.template import content_text, render

SHOWN = 5  # examples named in a finding
BINS = (0, 50, 200, 500, 1000, 2000, 5000, 10_000)
"""Edges of the histogram of lengths, in characters."""
ANSWER_COLUMNS = ("chosen", "completion", "response", "trajectory")
TEXT_COLUMNS = ("messages", "prompt", "rejected", *ANSWER_COLUMNS)


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    status: Literal["passed", "warning", "failed"]
    detail: str
    examples: list[str] = field(default_factory=list)
    """Ids of examples at fault, a few."""


@dataclass(frozen=True)
class Row:
    """One example, as far as the checks look at it."""

    kind: str
    split: str
    id: str
    user: str
    cluster: str
    question: str
    texts: tuple[str, ...]
    label: bool | None
    messages: list[dict[str, Any]]
    """The whole conversation: prompt and the (chosen) answer."""
    tools: list[dict[str, Any]] | None = None


def validate(
    manifest: Manifest, settings: Settings, *, tokenizer: Any = None, max_tokens: int | None = None
) -> list[Check]:
    """All checks of a dataset, in order. Later checks are left out when the files themselves are wrong."""
    files = check_files(manifest)
    if files.status == "failed":
        return [files]
    rows = list(read_rows(manifest))
    checks = [
        files,
        check_apart(rows, "user", lambda row: row.user),
        check_apart(rows, "cluster", lambda row: row.cluster),
        check_near_duplicates(rows, settings.curation),
        check_earlier_tests(rows, manifest, settings),
        check_repeats(rows),
        check_balance(rows),
        check_personal_data(rows, settings.curation),
        describe_lengths(rows),
    ]
    if tokenizer is not None:
        checks.append(check_tokens(rows, tokenizer, max_tokens))
    return checks


def check_files(manifest: Manifest) -> Check:
    """Every shard is there, unaltered, with the columns of its kind; together they have the stated hash."""
    for shard in manifest.shards:
        file = Path(manifest.path) / shard.path
        if not file.is_file():
            return Check("files", "failed", f"{shard.path} is missing")
        if hashlib.sha256(file.read_bytes()).hexdigest() != shard.sha256:
            return Check("files", "failed", f"{shard.path} was altered after it was written")
        schema = pq.read_schema(file)
        if not schema.equals(example_schema(shard.path.split("/")[0])):
            return Check("files", "failed", f"{shard.path} has columns {schema.names}")
        if pq.read_metadata(file).num_rows != shard.rows:
            return Check("files", "failed", f"{shard.path} has another number of rows than the manifest says")
    if manifest.erased_rows:
        return Check("files", "warning", f"{manifest.erased_rows} examples were erased since; curate anew to train")
    if dataset_hash(manifest.shards) != manifest.dataset_hash:
        return Check("files", "failed", "the shards do not have the dataset's hash")
    return Check("files", "passed", f"{len(manifest.shards)} shards as the manifest says")


def read_rows(manifest: Manifest) -> Iterator[Row]:
    """All examples, shard by shard."""
    for shard in manifest.shards:
        kind, split, _ = shard.path.split("/")
        for row in pq.read_table(Path(manifest.path) / shard.path).to_pylist():
            parts = {name: orjson.loads(row[name]) for name in TEXT_COLUMNS if row.get(name)}
            named = (parts[name] for name in ANSWER_COLUMNS if name in parts)
            answer: list[dict[str, Any]] = next(named, [])
            prompt = parts.get("prompt") or parts["messages"][:-1]
            texts = tuple(_whole_text(m) for messages in parts.values() for m in messages)
            texts += (row["item"],) if row.get("item") else ()
            asked = [*prompt, *parts["trajectory"][:-1]] if "trajectory" in parts else prompt
            yield Row(
                kind=kind,
                split=split,
                id=row["example_id"],
                user=row["user_id"],
                cluster=row["cluster_id"],
                question=question_text(asked),
                texts=texts,
                label=row.get("label"),
                messages=parts.get("messages") or [*prompt, *answer],
                tools=orjson.loads(row["tools"]) if row.get("tools") else None,
            )


def _whole_text(message: dict[str, Any]) -> str:
    """What a message says, and with what arguments it calls tools."""
    calls = (call.get("function", {}).get("arguments") for call in message.get("tool_calls") or [])
    return "\n".join([content_text(message), *(c if isinstance(c, str) else to_json(c) for c in calls)])


def check_apart(rows: Iterable[Row], what: str, of: Callable[[Row], str]) -> Check:
    """Nothing of a sort is in two splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[of(row)].add(row.split)
    shared = sorted(name for name, found in splits.items() if len(found) > 1)
    if shared:
        return Check(f"{what}s apart", "failed", f"{len(shared)} {what}s are in several splits", shared[:SHOWN])
    return Check(f"{what}s apart", "passed", f"{len(splits)} {what}s, each in one split")


def check_near_duplicates(rows: Sequence[Row], settings: CurationSettings) -> Check:
    """No question is, nearly, in two splits; found anew, without the clusters that curation made."""
    splits: dict[str, set[str]] = defaultdict(set)
    as_written: dict[str, str] = {}
    for row in rows:
        splits[normalise_text(row.question)].add(row.split)
        as_written.setdefault(normalise_text(row.question), row.question)
    questions = list(as_written.values())
    nodes = text_hashes(list(as_written))
    fields = text_hashes([record_fields(question, settings.dedup.field_lines) for question in questions])
    sketches = sketch_texts(questions, nodes, nodes, fields, settings.dedup)
    edges = near_edges(sketches, settings.dedup)
    by_node = dict(zip(nodes.tolist(), questions, strict=True))
    ends = (edges["left"].to_pylist(), edges["right"].to_pylist())
    pairs = [(by_node[a], by_node[b]) for a, b in zip(*ends, strict=True)]
    leaks = [a for a, b in pairs if len(splits[normalise_text(a)] | splits[normalise_text(b)]) > 1]
    leaks += [question for question, found in splits.items() if len(found) > 1]
    if leaks:
        shown = [leak[:80] for leak in leaks[:SHOWN]]
        return Check("near duplicates", "failed", f"{len(leaks)} questions are nearly in two splits", shown)
    detail = f"{len(questions)} questions, {len(pairs)} near-duplicate pairs, none across splits"
    return Check("near duplicates", "passed", detail)


def check_earlier_tests(rows: Iterable[Row], manifest: Manifest, settings: Settings) -> Check:
    """Nothing to train on is, nearly, a test question of another dataset beside this one."""
    name, dedup = "earlier tests", settings.curation.dedup
    kept = [read_sketches(file) for file in sketch_files(settings) if file.stem != manifest.dataset_id]
    questions = {normalise_text(row.question): row.question for row in rows if row.split != "test"}
    if not kept or not questions:
        return Check(name, "passed", f"{len(kept)} other datasets left test items here")
    tested = pa.concat_tables(kept)
    nodes = text_hashes(list(questions))
    fields = text_hashes([record_fields(question, dedup.field_lines) for question in questions.values()])
    own = sketch_texts(list(questions.values()), nodes, nodes, question_salts(fields), dedup)
    edges = near_edges(pa.concat_tables([own, tested]), dedup)
    was_tested = set(tested["node"].to_pylist())
    pairs = zip(edges["left"].to_pylist(), edges["right"].to_pylist(), strict=True)
    by_node = dict(zip(nodes.tolist(), questions.values(), strict=True))
    leaks = {a if a in by_node else b for a, b in pairs if {a, b} & was_tested and {a, b} & by_node.keys()}
    leaks = {node for node in leaks if node in by_node} | (was_tested & by_node.keys())
    if leaks:
        shown = [by_node[node][:80] for node in sorted(leaks)[:SHOWN]]
        return Check(name, "failed", f"{len(leaks)} questions to train on were in an earlier test set", shown)
    return Check(name, "passed", f"{len(questions)} questions, none of them in the tests of {len(kept)} other datasets")


def check_repeats(rows: Iterable[Row]) -> Check:
    """No example twice."""
    seen = Counter((row.kind, row.texts, row.label) for row in rows)
    repeated = sum(number - 1 for number in seen.values())
    status: Literal["passed", "warning"] = "warning" if repeated else "passed"
    return Check("repeats", status, f"{repeated} examples repeat another")


def check_balance(rows: Iterable[Row]) -> Check:
    """Both verdicts are among the judged answers of the training split."""
    labels = Counter(row.label for row in rows if row.kind == "unpaired" and row.split == "train")
    total = sum(labels.values())
    if not total:
        return Check("balance", "warning", "no judged answers in train")
    share = labels[True] / total
    status: Literal["passed", "warning"] = "passed" if 0.05 <= share <= 0.95 else "warning"
    return Check("balance", status, f"{share:.0%} of {total} judged answers in train are good")


def check_personal_data(rows: Iterable[Row], settings: CurationSettings) -> Check:
    """Nothing that the recognisers know, and nothing that looks like a secret."""
    at_fault, kinds = [], Counter[str]()
    for row in rows:
        text = "\n".join(row.texts)
        found = [span.kind for span in find(text, domains=settings.scrub.domains)]
        reason = suspicion(text, settings.scrub)
        kinds.update(found + ([reason] if reason else []))
        if found or reason:
            at_fault.append(row.id)
    if at_fault:
        listed = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
        return Check("personal data", "failed", f"{len(at_fault)} examples hold {listed}", at_fault[:SHOWN])
    return Check("personal data", "passed", "no structured personal data, nothing that looks like a secret")


def describe_lengths(rows: Iterable[Row]) -> Check:
    """The histogram of lengths; it only describes."""
    lengths = [sum(map(len, row.texts)) for row in rows]
    numbers, _ = np.histogram(lengths, bins=[*BINS, np.inf])
    shown = ", ".join(f"{low}+: {n}" for low, n in zip(BINS, numbers.tolist(), strict=True) if n)
    return Check("lengths", "passed", f"characters an example: {shown}")


def check_tokens(rows: Iterable[Row], tokenizer: Any, max_tokens: int | None) -> Check:
    """Every conversation can be rendered with the target's template, within its length."""
    longest, too_long, refused = 0, [], []
    for row in rows:
        try:
            tokens = len(render(tokenizer, row.messages, row.tools))
        except DatasetError:
            refused.append(row.id)
            continue
        longest = max(longest, tokens)
        if max_tokens is not None and tokens > max_tokens:
            too_long.append(row.id)
    if refused:
        return Check("tokens", "failed", f"the template refuses {len(refused)} examples", refused[:SHOWN])
    if too_long:
        return Check("tokens", "failed", f"{len(too_long)} examples exceed {max_tokens} tokens", too_long[:SHOWN])
    return Check("tokens", "passed", f"all rendered; the longest has {longest} tokens")
