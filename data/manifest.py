"""Datasets on disk: Parquet shards, a manifest that says how they came about, one hash for all of it.

The hash covers what is in the rows, row by row in canonical order, and nothing else: not the time, not the
machine, not how many tasks wrote it. A dataset is written beside its place and renamed into it, so a folder
with a manifest is always whole.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import DatasetError, InputError, NotFoundError
from cluster.runtime import PROJECT
from cluster.settings import Settings
from data.answers import EXAMPLES, KINDS
from data.join import to_json
from data.minhash import SKETCH_VERSION
from data.split import SPLITS
from data.stages import StageCount, rows_of

log = logging.getLogger(__name__)

SCHEMA_VERSION = 5
COMMON = (
    "example_id",
    "user_id",
    "interaction_ids",
    "cluster_id",
    "agent",
    "order",
    "origin",
    "synthetic",
    "prompt_digest",
)
DRAWN = ("logprob", "answer_tokens")
"""How likely an answer was, where it is known (`data.propensity`), and its tokens."""
COLUMNS = {
    "sft": (*COMMON, "messages", "tools", "weight", "score"),
    "preference": (*COMMON, "prompt", "chosen", "rejected", "tools", "margin", "category", "weight"),
    "unpaired": (*COMMON, "prompt", "completion", "label", "weight", "tools"),
    "reward": (*COMMON, "prompt", "response", "reward", "score_card", "category", "weight", "tools", *DRAWN),
    "trajectory": (*COMMON, "prompt", "trajectory", "reward", "weight", "tools"),
    "task": (*COMMON, "prompt", "item", "weight", "tools"),
}
"""Columns of each kind, in order."""
ROW_GROUP = 10_000
"""Rows that a writer or a reader of a shard holds at once."""
SHARDS = pa.schema(
    [("path", pa.string()), ("rows", pa.int64()), ("sha256", pa.string()), ("content_sha256", pa.string())]
)


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    path: str
    """Relative to the dataset's folder."""
    rows: int
    sha256: str
    """Of the file."""
    content_sha256: str
    """Of its rows as canonical JSON, one a line, in order of `example_id`."""


@dataclass(frozen=True)
class PromptUsed:
    """An agent's prompt in a dataset."""

    text: str
    examples: int


@dataclass(frozen=True)
class Manifest:
    """What a dataset is and how it came about."""

    dataset_id: str
    dataset_hash: str
    schema_version: int
    created_at: str
    tenant: str
    workspace: str
    agent: str | None
    config: dict[str, Any]
    git_commit: str | None
    sources: dict[str, Any]
    time_range: list[str]
    """First and last moment of the interactions used, RFC 3339."""
    stages: list[StageCount]
    counts: dict[str, dict[str, int]]
    """kind -> split -> examples."""
    shards: list[Shard]
    topics: dict[str, float] = field(default_factory=dict)
    """Topic -> share of the weight before balancing; empty where topics are off."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """What implicit signals were found to be worth (`data.calibration.Calibration`); empty where none were weighed."""
    prompts: dict[str, PromptUsed] = field(default_factory=dict)
    """Digest -> an agent's prompt that examples begin with."""
    erased_rows: int = 0
    """Examples that erasures have taken out since; the hash is still that of the dataset as it was made."""
    path: str = ""
    """Folder it was read from or written to; not part of the file."""

    def total(self, kind: str) -> int:
        """Examples of a kind, in all splits."""
        return sum(self.counts.get(kind, {}).values())


def write_shards(table: pa.Table, folder: Path) -> pa.Table:
    """Writes the shards in a block (column `shard`); returns rows of `SHARDS`. Needs all rows of a shard."""
    written = []
    names = sorted(pc.unique(table["shard"]).to_pylist())
    for name in names:
        rows = table if len(names) == 1 else table.filter(pc.equal(table["shard"], name))
        rows = rows.select(list(COLUMNS[name.split("/")[0]])).sort_by("example_id")
        target = folder / f"{name}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{uuid.uuid4().hex}.part")
        pq.write_table(rows, part, compression="zstd", write_statistics=False, row_group_size=ROW_GROUP)
        os.replace(part, target)
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        written.append((f"{name}.parquet", len(rows), digest, content_digest(rows)))
    return pa.table([list(c) for c in zip(*written, strict=True)] or [[]] * 4, schema=SHARDS)


def content_digest(rows: pa.Table) -> str:
    """SHA-256 over the rows as canonical JSON lines."""
    digest = hashlib.sha256()
    for row in rows_of(rows):
        digest.update(orjson.dumps(row, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
    return digest.hexdigest()


def dataset_hash(shards: Iterable[Shard]) -> str:
    """One hash of all rows, and of the versions of what shaped them."""
    contents = sorted((s.path, s.rows, s.content_sha256) for s in shards)
    return hashlib.sha256(to_json([SCHEMA_VERSION, SKETCH_VERSION, contents]).encode()).hexdigest()


def publish(building: Path, root: Path, manifest: Manifest) -> Manifest:
    """Puts a finished folder in its place; the same dataset already there is kept as it is."""
    write_manifest(building, manifest)
    place = root / manifest.dataset_id
    try:
        os.rename(building, place)
    except OSError:
        if load_manifest(place).dataset_hash != manifest.dataset_hash:
            raise DatasetError(f"{place} exists and holds another dataset; move it away") from None
        shutil.rmtree(building)
    return load_manifest(place)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, whole or not at all."""
    document = {k: v for k, v in asdict(manifest).items() if k != "path"}
    draft = folder / f".manifest.{uuid.uuid4().hex}"
    draft.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    os.replace(draft, folder / "manifest.json")


def load_manifest(path: Path | str) -> Manifest:
    """The manifest in a dataset's folder.

    Raises:
        NotFoundError: no manifest there.
        DatasetError: it was written by another version of the schema, or is damaged.
    """
    file = Path(path) / "manifest.json"
    if not file.is_file():
        raise NotFoundError(f"no dataset at {path}; see `rayloop data list`")
    try:
        return _parse_manifest(file, orjson.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{file} is damaged ({error}); curate again, or remove its folder") from None


def _parse_manifest(file: Path, document: dict[str, Any]) -> Manifest:
    if document.get("schema_version") != SCHEMA_VERSION:
        raise DatasetError(
            f"{file} has schema {document.get('schema_version')}, this is {SCHEMA_VERSION}; curate again"
        )
    document["stages"] = [StageCount(**stage) for stage in document["stages"]]
    document["shards"] = [Shard(**shard) for shard in document["shards"]]
    document["prompts"] = {digest: PromptUsed(**used) for digest, used in document.get("prompts", {}).items()}
    return Manifest(**document, path=str(file.parent))


def read_examples(dataset_dir: Path | str, kind: str, split: str) -> pa.Table:
    """All examples of a kind in a split, in order of the curriculum.

    Raises:
        InputError: an unknown kind or split.
        DatasetError: its files cannot be read.
    """
    if kind not in KINDS:
        raise InputError("kind", kind, f"must be one of {', '.join(KINDS)}", "name a known kind")
    if split not in SPLITS:
        raise InputError("split", split, f"must be one of {', '.join(SPLITS)}", "name a known split")
    manifest = load_manifest(dataset_dir)
    schema = example_schema(kind)
    files = [Path(manifest.path) / s.path for s in manifest.shards if s.path.startswith(f"{kind}/{split}/")]
    try:
        table = pa.concat_tables([schema.empty_table(), *(pq.read_table(f, schema=schema) for f in files)])
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"dataset {str(dataset_dir)!r} cannot be read ({error})") from None
    return table.sort_by([("order", "ascending"), ("example_id", "ascending")])


def example_schema(kind: str) -> pa.Schema:
    """Columns of a kind with their types."""
    return pa.schema([EXAMPLES.field(name) for name in COLUMNS[kind]])


def list_datasets(settings: Settings) -> list[Manifest]:
    """Datasets under the datasets root, the oldest first.

    Raises:
        DatasetError: one of them cannot be read.
    """
    return sorted((load_manifest(folder) for folder in _folders(settings)), key=_age)


def _readable(settings: Settings) -> list[Manifest]:
    """The same without those that cannot be read: one of an older schema must not hide the others."""
    found = []
    for folder in _folders(settings):
        try:
            found.append(load_manifest(folder))
        except DatasetError as error:
            log.warning("%s", error)
    return sorted(found, key=_age)


def _folders(settings: Settings) -> list[Path]:
    return [file.parent for file in datasets_root(settings).glob("*/manifest.json")]


def _age(manifest: Manifest) -> tuple[str, str]:
    return manifest.created_at, manifest.dataset_id


def find_dataset(settings: Settings, ref: str, *, agent: str | None = None) -> Path:
    """Folder of a dataset: by path, id, prefix of its hash, or `latest` (of an agent).

    Raises:
        NotFoundError: none, or more than one, with this reference.
    """
    if (Path(ref) / "manifest.json").is_file():
        return Path(ref).resolve()
    known = _readable(settings)
    if ref == "latest":
        found = [m for m in known if agent is None or m.agent == agent][-1:]
    else:
        found = [m for m in known if m.dataset_id == ref or (len(ref) >= 6 and m.dataset_hash.startswith(ref))]
    if len(found) != 1:
        names = ", ".join(m.dataset_id for m in known) or "none; run `rayloop curate`"
        raise NotFoundError(f"dataset {ref!r} names {len(found)} datasets; known: {names}")
    return Path(found[0].path)


def datasets_root(settings: Settings, out: Path | None = None) -> Path:
    """Folder that holds the datasets.

    Raises:
        InputError: the setting is a URI, which curation does not write to.
    """
    location = str(out or settings.datasets_root)
    if "://" in location and not location.startswith("file://"):
        raise InputError("storage.datasets", location, "must be a folder", "mount the location and name its folder")
    return Path(location.removeprefix("file://")).resolve()


def git_commit() -> str | None:
    """The commit of this code, with `+` when the working tree differs; `None` outside a repository."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def count_table(rows: Sequence[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """kind -> split -> examples, with zeros."""
    counts: dict[str, dict[str, int]] = {kind: dict.fromkeys(map(str, SPLITS), 0) for kind in KINDS}
    for kind, split, number in rows:
        counts[kind][split] += number
    return counts
