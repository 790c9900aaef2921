"""Stage 6, deduplicate: equal answers are merged, near-equal ones dropped, near-equal questions marked.

Questions and whole examples are compared by their sketches (`data.near`).

Two texts made of `field: value` lines are near duplicates only when all their fields agree: in a record,
one different value is a different case, however alike the rest reads (docs/decisions/).
"""

import re
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.settings.curation import CurationSettings, DeduplicationSettings
from data.interaction_bodies import Message
from data.join import to_json
from data.minhash import U64, mix, shingle, sketch_column, text_hashes
from data.near import SKETCHES, Clusters, cluster_of
from data.split import SPLITS, split_of
from data.stages import Dropped, with_column
from data.template import content_text

FIELD_PATTERNS = (
    re.compile(r"^[ \t]*[-*]?[ \t]*([^\W_][\w ./()-]{0,40}?)[ \t]*[:=][ \t]+(\S.*?)[ \t]*$", re.M),  # a line each
    re.compile(r"(?:^|[;|,\n])\s*([^\W_][\w ./()-]{0,40}?)\s*[:=] ?([^\s;|,][^;|,\n]*)(?=[;|,\n]|$)"),  # a row
    re.compile(r"\"([\w .-]{1,40})\"\s*:\s*(\"(?:[^\"\\]|\\.)*\"|-?[\d.]+|true|false|null)"),  # JSON
    re.compile(r"(?<!\S)([A-Za-z][\w.-]{0,40})=([^\s,;|]+)"),  # logfmt
)


def normalise_text(text: str) -> str:
    """Case, spacing and Unicode variants made equal."""
    plain = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(plain.split())


def question_text(messages: list[Message]) -> str:
    """What was asked: all turns but the system's, which is the same for everybody."""
    return "\n".join(content_text(m) for m in messages if m["role"] not in ("system", "developer"))


def record_fields(text: str, least: int) -> str:
    """Canonical text of the `field: value` pairs in a text; empty when it has fewer than `least`."""
    pairs: set[tuple[str, str]] = set()
    if text.count(":") + text.count("=") < least:
        return ""
    for pattern in FIELD_PATTERNS:
        pairs |= {(normalise_text(name), normalise_text(value).rstrip(",")) for name, value in pattern.findall(text)}
    return to_json(sorted(pairs)) if len({name for name, _ in pairs}) >= least else ""


def fingerprint(table: pa.Table, settings: CurationSettings) -> tuple[pa.Table, Dropped]:
    """Adds `node`, `answer_key`, `fields` (hashes of question, answer and record) and `split`."""
    questions = [question_text(orjson.loads(text)) for text in table["messages"].to_pylist()]
    answers = [normalise_text(content_text(orjson.loads(text))) for text in table["response"].to_pylist()]
    fields = [record_fields(question, settings.dedup.field_lines) for question in questions]
    splits = [split_of(user, settings.split) for user in table["user_id"].to_pylist()]
    table = with_column(table, "node", text_hashes([normalise_text(q) for q in questions]))
    table = with_column(table, "answer_key", text_hashes(answers))
    table = with_column(table, "fields", text_hashes(fields))
    return with_column(table, "split", splits, pa.string()), Counter()


def sketches_of(table: pa.Table, settings: DeduplicationSettings) -> pa.Table:
    """Rows of `SKETCHES`: for each distinct question, and each distinct question with its answer."""
    questions = [question_text(orjson.loads(text)) for text in table["messages"].to_pylist()]
    answers = [content_text(orjson.loads(text)) for text in table["response"].to_pylist()]
    node, fields = table["node"].to_numpy(), table["fields"].to_numpy()
    examples = mix(node * np.uint64(3) + table["answer_key"].to_numpy())
    texts = [*questions, *(f"{q}\n{a}" for q, a in zip(questions, answers, strict=True))]
    ids = np.concatenate([node, examples]).astype(np.uint64)
    salts = np.concatenate([question_salts(fields), mix(fields.astype(np.uint64) + np.uint64(2))])
    return sketch_texts(texts, ids, np.concatenate([node, node]).astype(np.uint64), salts, settings)


def question_salts(fields: U64) -> U64:
    """What keeps questions apart that hold different records, and from whole examples."""
    return mix(fields.astype(np.uint64) + np.uint64(1))


def sketch_texts(texts: list[str], ids: U64, nodes: U64, salts: U64, settings: DeduplicationSettings) -> pa.Table:
    """Rows of `SKETCHES` of texts, each id once. Texts of different salts never share a key."""
    ids, first = np.unique(ids, return_index=True)
    if not len(ids):
        return SKETCHES.empty_table()
    column = pa.array([texts[i] for i in first], pa.string())
    bins = settings.bands * settings.rows_per_band
    sketches = sketch_column(column, settings.shingle_words, bins, settings.seed)
    return pa.table([ids, nodes[first], salts[first], _rows_as_binary(sketches)], schema=SKETCHES)


def sketches_of_nodes(sketches: pa.Table, nodes: U64) -> pa.Table:
    """The sketches of some questions, and of these with their answers."""
    return sketches.filter(pa.array(np.isin(sketches["node"].to_numpy(), nodes)))


def assign_clusters(table: pa.Table, clusters: Clusters) -> tuple[pa.Table, Dropped]:
    """Adds `cluster` and `seen_in_test`."""
    own = cluster_of(table["node"].to_numpy(), clusters)
    table = with_column(table, "cluster", own)
    return with_column(table, "seen_in_test", np.isin(own, clusters.tested)), Counter()


def deduplicate(table: pa.Table, settings: CurationSettings) -> tuple[pa.Table, Dropped]:
    """One row of each answer to a question, in each split. Needs all rows of a cluster.

    Equal answers to one question become one row: scores are averaged by weight, weights added, signals and
    interaction ids joined. Of near-equal answers with about the same score, those with the most weight
    stay; near-equal answers of which one is good and one bad are what a preference pair is made of.
    """
    ids = pa.ListArray.from_arrays(np.arange(len(table) + 1, dtype=np.int32), table["interaction_id"].combine_chunks())
    table = with_column(table, "interaction_ids", ids)
    alone = ~_in_company(table)
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in table.filter(pa.array(~alone)).to_pylist():
        groups[row["cluster"], row["split"]].append(row)
    dropped: Dropped = Counter()
    kept: list[dict[str, Any]] = []
    merged = {key: _merge_equal(groups[key]) for key in sorted(groups)}
    dropped["exact duplicate"] = sum(map(len, groups.values())) - sum(map(len, merged.values()))
    several = [row for rows in merged.values() if len(rows) > settings.dedup.keep_per_cluster for row in rows]
    hashes = _answer_shingles(several, settings)
    for rows in merged.values():
        distinct = _drop_near(rows, hashes, settings)
        dropped["near duplicate"] += len(rows) - len(distinct)
        kept += distinct
    return pa.concat_tables([table.filter(pa.array(alone)), pa.Table.from_pylist(kept, table.schema)]), +dropped


def _in_company(table: pa.Table) -> NDArray[np.bool_]:
    """Whether a row's question has another row in its cluster and split; most have none."""
    strictness = pc.index_in(table["split"], value_set=pa.array(SPLITS)).to_numpy()
    keys = mix(table["cluster"].to_numpy()) + strictness.astype(np.uint64)
    _, place, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    return np.asarray(sizes[place] > 1)


def _merge_equal(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_text: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r["at_us"], r["interaction_id"])):
        by_text[row["node"], row["answer_key"]].append(row)
    return [_merge(by_text[key]) for key in sorted(by_text)]


def _merge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if len(rows) == 1:
        return rows[0]
    weights = [max(row["weight"], 1e-9) for row in rows]
    voted = [(w, r["explicit"]) for w, r in zip(weights, rows, strict=True) if r["explicit"] is not None]
    signals = [signal for row in rows for signal in orjson.loads(row["signals"])]
    labels = [label for row in rows for label in orjson.loads(row["labels"])]
    return rows[0] | {
        "score": sum(w * r["score"] for w, r in zip(weights, rows, strict=True)) / sum(weights),
        "explicit": sum(w * e for w, e in voted) / sum(w for w, _ in voted) if voted else None,
        "weight": sum(row["weight"] for row in rows),
        "signals": to_json(signals),
        "labels": to_json(labels),
        "interaction_ids": [row["interaction_id"] for row in rows],
    }


def _answer_shingles(rows: list[dict[str, Any]], settings: CurationSettings) -> dict[int, U64]:
    """The shingles of each row's answer, by the row's `id`: all rows at once, for a call costs more than a text."""
    answers = [content_text(orjson.loads(row["response"])) for row in rows]
    shingles = shingle(pa.array(answers, pa.string()), settings.dedup.shingle_words)
    edges = pairwise(shingles.offsets)
    return {id(row): shingles.hashes[begin:end] for row, (begin, end) in zip(rows, edges, strict=True)}


def _drop_near(rows: list[dict[str, Any]], hashes: dict[int, U64], settings: CurationSettings) -> list[dict[str, Any]]:
    """Of rows whose answers are near duplicates, the first `keep_per_cluster` by weight."""
    most = settings.dedup.keep_per_cluster
    if len(rows) <= most:
        return rows
    rows = sorted(rows, key=lambda r: (-r["weight"], r["at_us"], r["interaction_id"]))
    fields = [record_fields(content_text(orjson.loads(row["response"])), 1) for row in rows]
    sets = [set(hashes[id(row)].tolist()) for row in rows]
    kept: list[int] = []

    def near(i: int, k: int) -> bool:
        if fields[i] != fields[k] or abs(rows[i]["score"] - rows[k]["score"]) >= settings.examples.min_margin:
            return False
        return jaccard(sets[i], sets[k]) >= settings.dedup.threshold

    for i in range(len(rows)):
        if sum(near(i, k) for k in kept) < most:
            kept.append(i)
    return [rows[i] for i in kept]


def jaccard(left: set[int], right: set[int]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def _rows_as_binary(matrix: NDArray[Any]) -> pa.Array:
    """The rows of a matrix, without a copy where they lie in one piece."""
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * np.int32(matrix.shape[1] * matrix.itemsize)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(matrix))]
    return pa.Array.from_buffers(pa.binary(), len(matrix), buffers)
