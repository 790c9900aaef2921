"""Sketches of all that was ever in test, kept beside the datasets, so that none of it enters a later training set.

Sketches made under other settings cannot be compared, so they lie in a folder named for what made them.
"""

import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InputError
from cluster.settings import Settings
from cluster.settings.curation import DeduplicationSettings
from data.manifest import datasets_root
from data.minhash import SKETCH_VERSION, U64
from data.near import SKETCHES


def made_by(settings: DeduplicationSettings) -> str:
    """Name of what decides a sketch."""
    version = SKETCH_VERSION.replace("/", "_")
    return (
        f"{version},words={settings.shingle_words},bins={settings.bands * settings.rows_per_band},seed={settings.seed}"
    )


def sketch_files(settings: Settings) -> list[Path]:
    """The files of the configured root, whatever folder a dataset is written to.

    Raises:
        InputError: there are sketches of earlier test items that today's settings cannot be held against.
    """
    folder = _folder(settings)
    others = sorted(path.name for path in folder.parent.glob("*/") if path != folder and any(path.glob("*.parquet")))
    if others:
        raise InputError(
            "curation.dedup",
            folder.name,
            f"cannot be compared with the test items kept so far ({others[0]})",
            f"set it back, or move {folder.parent / others[0]} away and let what was in test be trained on",
        )
    return sorted(folder.glob("*.parquet"))


def read_sketches(file: Path | str) -> pa.Table:
    """Rows of `SKETCHES`."""
    return pq.read_table(file, schema=SKETCHES)


def kept_parts(settings: Settings) -> list[tuple[Path, int]]:
    """All that is kept, in parts that one task can read: file and row group."""
    return [(file, part) for file in sketch_files(settings) for part in range(pq.ParquetFile(file).num_row_groups)]


def read_part(place: tuple[Path, int]) -> pa.Table:
    """Rows of `SKETCHES`."""
    file, part = place
    return pq.ParquetFile(file).read_row_group(part).cast(SKETCHES)


def kept_nodes(settings: Settings) -> U64:
    """The questions of all that is kept, each once, sorted."""
    return _column(settings, "node")


def keep_sketches(settings: Settings, dataset_id: str, sketches: Iterable[pa.Table]) -> None:
    """Add a dataset's test items, as far as they are not kept yet; one table at a time is held."""
    known = _column(settings, "text")
    file = _folder(settings) / f"{dataset_id}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{uuid.uuid4().hex}.part")
    added = 0
    try:
        with pq.ParquetWriter(part, SKETCHES, compression="zstd") as writer:
            for table in sketches:
                fresh = table.filter(pa.array(~np.isin(table["text"].to_numpy(), known))).sort_by("text")
                added += len(fresh)
                if len(fresh):
                    writer.write_table(fresh)
        if added:
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _column(settings: Settings, name: str) -> U64:
    """The distinct values of a column of all that is kept."""
    found = [pq.read_table(file, columns=[name])[name].to_numpy() for file in sketch_files(settings)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))


def _folder(settings: Settings) -> Path:
    root = datasets_root(settings) / "test_sketches" / settings.tenant / settings.workspace
    return root / made_by(settings.curation.dedup)
