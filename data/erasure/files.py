"""What an erasure removes from files: spooled events, examples of datasets, caches of answers."""

import hashlib
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy.engine import Engine

from cluster.errors import NotFoundError
from cluster.settings import Settings
from data.events import Event
from data.log import EventLog, is_refused, refused_subjects
from data.manifest import Manifest, Shard, content_digest, list_datasets, load_manifest, write_manifest
from data.spool import SpoolFile, parsed, spool_files

log = logging.getLogger(__name__)

CACHE_FOLDERS = ("evaluation",)
"""Below `home`: files that can be made again at any time."""


def spooled(settings: Settings, tenant: str, user_id: str) -> list[Event]:
    """What the spools on this machine hold of the person."""
    waiting = (event for file in spool_files(settings.home) for _, event in _events(file))
    return [event for event in waiting if event is not None and (event.tenant, event.user_id) == (tenant, user_id)]


def clean_spools(settings: Settings, engine: Engine) -> None:
    """Take what the tombstones refuse out of the spools of routers that are gone.

    A living router brings its spool to the log, which refuses the person, and removes the file.
    """
    for path in spool_files(settings.home):
        claimed = SpoolFile.claim(path)
        if claimed is None:
            continue
        try:
            _clean_spool(path, engine)
        finally:
            claimed.close()


def _clean_spool(path: Path, engine: Engine) -> None:
    lines = list(_events(path))
    with engine.connect() as connection:
        refused = refused_subjects(connection, [event for _, event in lines if event is not None])
    kept = [line for line, event in lines if event is None or not is_refused(event, refused)]
    if len(kept) < len(lines):
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        draft.write_bytes(b"".join(kept))
        os.replace(draft, path)


def _events(file: Path) -> Iterator[tuple[bytes, Event | None]]:
    """Its lines, as `data.spool.parsed` gives them."""
    try:
        with file.open("rb") as stream:
            yield from parsed(stream.readlines())
    except FileNotFoundError:
        return  # its router has brought it home


# datasets


def datasets_with(
    settings: Settings, engine: Engine, tenant: str, user_id: str, interactions: set[str]
) -> list[Manifest]:
    """Datasets with examples of the person: those under the datasets root, and those the log says were made."""
    found = {manifest.path: manifest for manifest in list_datasets(settings)}
    for recorded in EventLog(engine).scan(kinds=["dataset.ready"], tenant=tenant):
        path = recorded.event.body.get("path", "")
        try:
            found.setdefault(path, load_manifest(path))
        except NotFoundError:
            log.warning("the dataset at %s is not there any more; a copy of it elsewhere keeps what it holds", path)
    return [
        manifest
        for _, manifest in sorted(found.items())
        if manifest.tenant == tenant and _holds(manifest, user_id, interactions)
    ]


def _holds(manifest: Manifest, user_id: str, interactions: set[str]) -> bool:
    return any(not all(_kept(_read(manifest, shard), user_id, interactions)) for shard in manifest.shards)


def _read(manifest: Manifest, shard: Shard, columns: Sequence[str] = ("user_id", "interaction_ids")) -> pa.Table:
    return pq.read_table(Path(manifest.path) / shard.path, columns=list(columns))


def _kept(rows: pa.Table, user_id: str, interactions: set[str]) -> list[bool]:
    """For each example, whether it has nothing of the person."""
    users, ids = rows["user_id"].to_pylist(), rows["interaction_ids"].to_pylist()
    return [u != user_id and interactions.isdisjoint(i or ()) for u, i in zip(users, ids, strict=True)]


def clean_datasets(paths: Iterable[str], user_id: str, interactions: set[str]) -> list[str]:
    """Take the person's examples out of datasets; returns the ids of the datasets."""
    names = []
    for path in paths:
        try:
            manifest = load_manifest(path)
        except NotFoundError:
            continue
        _clean_dataset(manifest, user_id, interactions)
        names.append(manifest.dataset_id)
    return sorted(names)


def _clean_dataset(manifest: Manifest, user_id: str, interactions: set[str]) -> None:
    shards = [_clean_shard(manifest, shard, user_id, interactions) for shard in manifest.shards]
    counts: dict[str, dict[str, int]] = {kind: dict.fromkeys(splits, 0) for kind, splits in manifest.counts.items()}
    for shard in shards:
        kind, split, _ = shard.path.split("/")
        counts[kind][split] += shard.rows
    gone = sum(s.rows for s in manifest.shards) - sum(s.rows for s in shards)
    erased_rows = manifest.erased_rows + gone
    write_manifest(Path(manifest.path), replace(manifest, shards=shards, counts=counts, erased_rows=erased_rows))


def _clean_shard(manifest: Manifest, shard: Shard, user_id: str, interactions: set[str]) -> Shard:
    """The shard as it is without the person, described from the file, whatever the manifest says of it."""
    target = Path(manifest.path) / shard.path
    rows = pq.read_table(target)
    kept = _kept(rows, user_id, interactions)
    if not all(kept):
        rows = rows.filter(pa.array(kept)).combine_chunks()
        draft = target.with_suffix(f".{uuid.uuid4().hex}.part")
        pq.write_table(rows, draft, compression="zstd", write_statistics=False)
        os.replace(draft, target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    return Shard(shard.path, len(rows), digest, content_digest(rows))


def drop_caches(settings: Settings) -> None:
    """Remove kept answers to held-out prompts: they may be the person's, and are made again on demand."""
    for folder in CACHE_FOLDERS:
        for file in (settings.home / folder).glob("*.json"):
            file.unlink(missing_ok=True)


def describe(report: dict[str, Any]) -> str:
    """A finished erasure for people."""
    events = ", ".join(f"{count} {kind}" for kind, count in report["events"].items()) or "no events"
    lines = [f"erased {report['user_id']} of tenant {report['tenant']} at {report['erased_at']}", f"events: {events}"]
    for name in ("partitions", "datasets", "versions", "exports"):
        lines.append(f"{name}: {', '.join(report[name]) or 'none'}")
    lines.append(f"write-ahead log: {report['write_ahead_log']}")
    if report["versions"]:
        lines.append("these versions need retraining and can no longer be promoted\nnext: rayloop curate")
    return "\n".join(lines)
