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
from data.minhash import SKETCH_VERSION
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


def keep_sketches(settings: Settings, dataset_id: str, sketches: Iterable[pa.Table]) -> None:
    """Add a dataset's test items, as far as they are not kept yet."""
    known = [read_sketches(file)["text"].to_numpy() for file in sketch_files(settings)]
    table = pa.concat_tables([SKETCHES.empty_table(), *sketches]).sort_by("text")
    fresh = ~np.isin(table["text"].to_numpy(), np.concatenate([np.zeros(0, np.uint64), *known]))
    if not fresh.any():
        return
    file = _folder(settings) / f"{dataset_id}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{uuid.uuid4().hex}.part")
    pq.write_table(table.filter(pa.array(fresh)), part, compression="zstd")
    part.replace(file)


def _folder(settings: Settings) -> Path:
    root = datasets_root(settings) / "test_sketches" / settings.tenant / settings.workspace
    return root / made_by(settings.curation.dedup)
